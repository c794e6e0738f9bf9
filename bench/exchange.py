"""Cost of one denoising step with and without the exchange: `python -m bench.exchange`.

Two ranks, patches only (no splitting of the guidance batch), one torch thread per rank. All modes, over each
backend, are timed in turn within one run, several rounds, so that a machine whose speed drifts shifts them
alike; ratios are medians of the rounds' ratios.

`none` is the naive baseline: attention there reads the own keys only, so a part of what `displaced` costs
more is arithmetic. `unsent` is `displaced` without its messages: the difference is what they cost.
`paper` is DistriFusion's own mix. `of expected` is the step over what `exchange="auto"` expects of it from a
synchronous one.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import cast

import torch
from diffusers import UNet2DConditionModel

from bench.arguments import add_backends, add_json, side
from bench.barrier import barrier
from bench.report import Report
from distriray import ParallelConfig, parallelize
from distriray.arguments import at_least, positive
from distriray.collective import Communicator, Work, connect, launch, serve_store
from distriray.collective.local import NothingInFlight
from distriray.collective.subgroup import Subgroup
from distriray.config import MIXES, PAPER, ExchangeMode, Mix
from distriray.landscapes import MODEL_DIR
from distriray.parallel import engine_of
from distriray.parallel.choice import CANDIDATES, expected_step_s

ALONE, UNSENT = "one rank", "unsent"
SETTLING = 3
"""Steps of an image before one does all that later ones do: two changes come before weights are fitted."""
EXCHANGES: Mapping[str, ExchangeMode | Mix] = {
    "none": "none",
    UNSENT: "displaced",
    "paper": PAPER,
    **{name: cast(ExchangeMode, name) for name in MIXES},
}
"""What each mode exchanges in, but for one rank alone."""


@dataclass(frozen=True)
class Timing:
    """One round of one mode: seconds of a step (median) and of waiting, waits, bytes a rank sends.

    `expected` are the seconds that `exchange="auto"` expects of each of its mixes, by a synchronous step.
    """

    step_s: float
    wait_s: float
    waits: int
    bytes_sent: int
    expected: Mapping[str, float] = field(default_factory=dict)


class Mutable(Subgroup):
    """A gang whose layers can be made to send nothing; the gather of the noise goes on."""

    mute = False

    def subgroup(self, ranks: Sequence[int]) -> Subgroup:
        return _Layers(self, ranks)


class _Layers(Subgroup):
    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> Work:
        if isinstance(self._parent, Mutable) and self._parent.mute:
            return NothingInFlight()
        return super().exchange(sends, receives)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=side, default=512, help="pixels of a side (default 512)")
    parser.add_argument("--ranks", type=at_least(2), default=2)
    add_backends(parser)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--steps", type=positive, default=6, help="timed steps a round")
    add_json(parser)
    arguments = parser.parse_args()
    served = serve_store("127.0.0.1")
    shape = (arguments.size, arguments.rounds, arguments.steps)
    rounds = launch(arguments.ranks, measure, served.address, arguments.backends, *shape)[0]

    report = Report(
        f"bench.exchange: one step of builtin:landscapes at {arguments.size}x{arguments.size} with guidance, "
        f"{arguments.ranks} ranks, one thread each, patches only",
        columns=(
            "mode",
            "backend",
            "s/step",
            "waiting",
            "waits",
            "sent/step",
            "faster than one rank",
            "of none",
            "of expected",
        ),
        seed=0,
        settings=vars(arguments),
    )
    for mode, backend in rounds[0]:
        timings = [timing[mode, backend] for timing in rounds]
        alone = [timing[ALONE, "-"].step_s for timing in rounds]
        none = [
            timing["none", arguments.backends[0] if backend == "-" else backend].step_s for timing in rounds
        ]
        step_s = median(t.step_s for t in timings)
        expected = [timing["sync", backend].expected.get(mode) for timing in rounds if backend != "-"]
        of_expected = [t.step_s / s for t, s in zip(timings, expected, strict=True) if s] if expected else []
        report.add(
            mode,
            backend,
            f"{step_s:.4f}",
            f"{median(t.wait_s / t.step_s for t in timings):.1%}",
            str(timings[-1].waits),
            f"{timings[-1].bytes_sent / 2**20:.2f} MiB",
            f"{median(one / t.step_s for one, t in zip(alone, timings, strict=True)):.2f}x",
            f"{median(t.step_s / least for t, least in zip(timings, none, strict=True)):.3f}x",
            f"{median(of_expected):.2f}x" if of_expected else "-",
        )
    report.publish(arguments.json)


def measure(
    communicator: Communicator, address: str, backends: list[str], size: int, rounds: int, steps: int
) -> list[dict[tuple[str, str], Timing]]:
    """Time every mode over every backend `rounds` times."""
    rank, ranks = communicator.rank, communicator.world_size
    gangs = {
        name: connect(name, rank=rank, world_size=ranks, address=address, name=name) for name in backends
    }
    unet = UNet2DConditionModel.from_pretrained(MODEL_DIR, subfolder="unet").float().eval()
    timings = []
    for _ in range(rounds):
        taken = {(ALONE, "-"): _time_mode(unet, communicator, ALONE, size, steps)}
        for mode in EXCHANGES:
            for name, gang in gangs.items():
                taken[mode, name] = _time_mode(unet, gang, mode, size, steps)
        timings.append(taken)
    return timings


def _time_mode(
    unet: UNet2DConditionModel, communicator: Communicator, mode: str, size: int, steps: int
) -> Timing:
    if mode == ALONE:
        barrier(communicator)  # the other ranks wait, without computing, for this one
        if communicator.rank:
            barrier(communicator)
            return Timing(0.0, 0.0, 0, 0)
        parallelize(unet, connect("local"))
    else:
        gang = Mutable(communicator, range(communicator.world_size))
        config = ParallelConfig(exchange=EXCHANGES[mode], warmup_steps=1, cfg_parallel=False)
        parallelize(unet, gang, config)
    engine = engine_of(unet)
    assert engine is not None
    inputs = unet_inputs(unet, size)
    statistics = []
    with engine.image():
        for step in range(SETTLING + steps):
            unet(timestep=900 - step, **inputs)
            statistics.append(engine.statistics)
            if mode == UNSENT:
                gang.mute = True
    if mode == ALONE:
        barrier(communicator)
    kept = statistics[SETTLING:]
    step_s, wait_s = median(s.seconds for s in kept), median(s.wait_s for s in kept)
    expected: dict[str, float] = {}
    if mode == "sync":
        parts = zip(*([s.seconds, *(w.seconds for w in s.waiting[:2])] for s in kept), strict=True)
        expected.update(zip(CANDIDATES, expected_step_s(*map(median, parts)), strict=True))
    return Timing(step_s, wait_s, kept[-1].waits, kept[-1].bytes_sent, expected)


def unet_inputs(unet: UNet2DConditionModel, size: int) -> dict[str, object]:
    """Seeded inputs of one guided step at `size` pixels: a batch of two."""
    generator = torch.Generator().manual_seed(0)
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {
        "sample": torch.randn((2, config.in_channels, size // 8, size // 8), generator=generator),
        "encoder_hidden_states": torch.randn((2, 77, config.cross_attention_dim), generator=generator),
        "added_cond_kwargs": {
            "text_embeds": torch.randn((2, pooled), generator=generator),
            "time_ids": torch.tensor([[size, size, 0, 0, size, size]] * 2, dtype=torch.float32),
        },
    }


if __name__ == "__main__":
    main()
