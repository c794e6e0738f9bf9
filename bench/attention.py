"""A synchronous step by `gather`, `ulysses` and diffusers: `python -m bench.attention [--network unet]`.

A slice of FLUX.1, of Qwen-Image with a call for each branch of guidance, or of SDXL's U-Net with one for
both, fewer and narrower heads and blocks, so that a CPU does a step in about a second; one torch thread a
rank. All ways are timed in turn within each round, over each backend, so that a machine whose speed drifts
shifts them alike; ratios are medians of the rounds' ratios. Where branches have calls of their own, halves of
the gang make one each besides. diffusers' own way is its context parallelism by Ulysses, over gloo, where it
has a plan for the network and heads divide.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, cast

import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, UNet2DConditionModel
from torch.distributed import PrefixStore

from bench.arguments import add_backends, add_json, side
from bench.launches import Collectives, spread_by_diffusers
from bench.published import PUBLISHED, SDXL, Published
from bench.report import Report
from distriray import ParallelConfig, parallelize
from distriray.arguments import at_least, positive
from distriray.collective import Communicator, connect, launch, serve_store
from distriray.collective.store import open_store
from distriray.config import AttentionMode
from distriray.parallel import engine_of

WAYS = ("gather", "ulysses")
BY_HALVES = ", by halves"
NETWORKS = {
    "flux": "1 + 2 blocks of FLUX.1",
    "qwen-image": "2 blocks of Qwen-Image, guided",
    "unet": "two levels of SDXL",
}


Key = tuple[str, str]
"""Backend and way."""


@dataclass(frozen=True)
class Timing:
    """Of the steps of a round, the medians, of this rank; diffusers does not say how long it waits."""

    step_s: float
    wait_s: float | None
    waits: int
    bytes_sent: int

    @property
    def waiting(self) -> float | None:
        return None if self.wait_s is None else self.wait_s / self.step_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, default="flux")
    parser.add_argument("--size", type=side, default=512, help="pixels of a side (default 512)")
    parser.add_argument("--ranks", type=at_least(2), nargs="+", default=[2, 4])
    add_backends(parser)
    parser.add_argument("--heads", type=positive, default=12, help="of 64 channels (default 12)")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--steps", type=positive, default=3, help="timed steps a round")
    add_json(parser)
    arguments = parser.parse_args()
    report = Report(
        f"bench.attention: a synchronous step of {NETWORKS[arguments.network]}, {arguments.heads} heads of "
        f"64, at {arguments.size}x{arguments.size}, one thread a rank",
        ("ranks", "backend", "attention", "s/step", "waiting", "waits", "sent/step", "of gather"),
        seed=0,
        settings=vars(arguments),
    )
    shape = arguments.network, arguments.size, arguments.heads, arguments.rounds, arguments.steps
    for ranks in arguments.ranks:
        served = serve_store("127.0.0.1")
        rounds = launch(ranks, measure, served.address, arguments.backends, *shape)[0]
        for backend, way in rounds[0]:
            timings = [timing[backend, way] for timing in rounds]
            gathered = [timing[backend, "gather"].step_s for timing in rounds]
            waiting = [timing.waiting for timing in timings if timing.waiting is not None]
            report.add(
                str(ranks),
                backend,
                way,
                f"{median(timing.step_s for timing in timings):.3f}",
                f"{median(waiting):.0%}" if waiting else "-",
                str(timings[-1].waits),
                f"{timings[-1].bytes_sent / 2**20:.1f} MiB",
                f"{median(t.step_s / g for t, g in zip(timings, gathered, strict=True)):.2f}x",
            )
    report.publish(arguments.json)


def measure(
    communicator: Communicator,
    address: str,
    backends: list[str],
    name: str,
    size: int,
    heads: int,
    rounds: int,
    steps: int,
) -> list[dict[Key, Timing]]:
    """Time every way over every backend `rounds` times."""
    rank, ranks = communicator.rank, communicator.world_size
    gangs = {
        name: connect(name, rank=rank, world_size=ranks, address=address, name=name) for name in backends
    }
    torch.manual_seed(0)
    model = slice_of(name, heads)
    network: Any = model.make().eval()
    inputs = model.inputs_of(network, size)
    ways: dict[Key, Callable[[], Timing]] = {}
    for backend, gang in gangs.items():
        for way in (*WAYS, *(f"{way}{BY_HALVES}" for way in WAYS if model.branches)):
            ways[backend, way] = partial(_time, model, network, gang, way, inputs, steps)
    if "gloo" in backends and network._cp_plan is not None and heads % ranks == 0:
        store = PrefixStore("diffusers", open_store(address))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        theirs = spread_by_diffusers(deepcopy(network), ranks)
        ways["gloo", "diffusers"] = partial(_time_theirs, model, theirs, ranks, inputs, steps)
    try:
        return [{key: measure_one() for key, measure_one in ways.items()} for _ in range(rounds)]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def slice_of(name: str, heads: int) -> Published:
    """A part of a published network whose attention has so many heads of 64 channels."""
    if name == "flux":
        transformer = partial(
            FluxTransformer2DModel,
            guidance_embeds=True,
            num_layers=1,
            num_single_layers=2,
            num_attention_heads=heads,
            attention_head_dim=64,
            axes_dims_rope=(8, 28, 28),
        )
        return replace(PUBLISHED[name], make=transformer)
    if name == "qwen-image":
        narrow = partial(
            QwenImageTransformer2DModel,
            num_layers=2,
            num_attention_heads=heads,
            attention_head_dim=64,
            axes_dims_rope=(8, 28, 28),
            joint_attention_dim=128,
        )
        return replace(PUBLISHED[name], make=narrow)
    config = SDXL | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (64, 64 * heads),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (1, heads),
        "cross_attention_dim": 128,
    }
    return replace(PUBLISHED["sdxl"], make=partial(UNet2DConditionModel, **config))


def _time(
    model: Published, network: Any, gang: Communicator, way: str, inputs: dict[str, Any], steps: int
) -> Timing:
    attention, by_halves = way.removesuffix(BY_HALVES), way.endswith(BY_HALVES)
    config = ParallelConfig(exchange="sync", attention=cast(AttentionMode, attention), cfg_parallel=by_halves)
    engine = engine_of(parallelize(network, gang, config))
    assert engine is not None
    statistics = []
    with engine.image():
        for step in range(steps + 1):
            _call(model, network, step, inputs)
            statistics.append(engine.statistics)
    kept = statistics[1:]  # the first makes buffers
    return Timing(
        median(each.seconds for each in kept),
        median(each.wait_s for each in kept),
        kept[-1].waits,
        kept[-1].bytes_sent,
    )


def _time_theirs(model: Published, network: Any, ranks: int, inputs: dict[str, Any], steps: int) -> Timing:
    inputs = {**inputs, "return_dict": False}
    with torch.no_grad():
        with Collectives(ranks) as collectives:
            _call(model, network, 0, inputs)
        seconds = []
        for step in range(steps):
            began = time.perf_counter()
            _call(model, network, step + 1, inputs)
            seconds.append(time.perf_counter() - began)
    sent = sum(collectives.sent) * (ranks - 1)
    return Timing(median(seconds), None, len(collectives.sent), sent)


def _call(model: Published, network: Any, step: int, inputs: dict[str, Any]) -> None:
    model.call(network, model.timestep_on("cpu", 900.0 - 10 * step), inputs)


if __name__ == "__main__":
    main()
