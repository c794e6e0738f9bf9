"""A synchronous step of a transformer by `gather`, `ulysses` and diffusers: `python -m bench.attention`.

A slice of FLUX.1, fewer and narrower heads and blocks, so that a CPU does a step in about a second; one torch
thread a rank. All ways are timed in turn within each round, over each backend, so that a machine whose speed
drifts shifts them alike; ratios are medians of the rounds' ratios. diffusers' own way is its context
parallelism by Ulysses, over gloo, where heads divide.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, cast

import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel
from torch.distributed import PrefixStore

from bench.arguments import add_json
from bench.launches import Collectives, spread_by_diffusers
from bench.published import PUBLISHED
from bench.report import Report
from distriray import ParallelConfig, parallelize
from distriray.arguments import positive
from distriray.collective import Communicator, connect, launch, serve_store
from distriray.collective.store import open_store
from distriray.config import AttentionMode
from distriray.parallel import engine_of

WAYS = ("gather", "ulysses")


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
    parser.add_argument("--size", type=positive, default=512, help="pixels of a side (default 512)")
    parser.add_argument("--ranks", type=positive, nargs="+", default=[2, 4])
    parser.add_argument("--backends", nargs="+", default=["shm", "gloo"])
    parser.add_argument("--heads", type=positive, default=12, help="of 64 channels (default 12)")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--steps", type=positive, default=3, help="timed steps a round")
    add_json(parser)
    arguments = parser.parse_args()
    report = Report(
        f"bench.attention: a synchronous step of 1 + 2 blocks of FLUX.1, {arguments.heads} heads of 64, at "
        f"{arguments.size}x{arguments.size} with 512 tokens of text, one thread a rank",
        ("ranks", "backend", "attention", "s/step", "waiting", "waits", "sent/step", "of gather"),
        seed=0,
        settings=vars(arguments),
    )
    shape = arguments.size, arguments.heads, arguments.rounds, arguments.steps
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
    network = FluxTransformer2DModel(
        guidance_embeds=True,
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=heads,
        attention_head_dim=64,
        axes_dims_rope=(8, 28, 28),
    ).eval()
    inputs = PUBLISHED["flux"].inputs(network, size)
    ways: dict[Key, Callable[[], Timing]] = {}
    for backend, gang in gangs.items():
        for way in WAYS:
            ways[backend, way] = partial(_time, network, gang, way, inputs, steps)
    if "gloo" in backends and heads % ranks == 0:
        store = PrefixStore("diffusers", open_store(address))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        theirs = spread_by_diffusers(deepcopy(network), ranks)
        ways["gloo", "diffusers"] = partial(_time_theirs, theirs, ranks, inputs, steps)
    try:
        return [{key: measure_one() for key, measure_one in ways.items()} for _ in range(rounds)]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _time(
    network: FluxTransformer2DModel, gang: Communicator, way: str, inputs: dict[str, Any], steps: int
) -> Timing:
    config = ParallelConfig(exchange="sync", attention=cast(AttentionMode, way))
    engine = engine_of(parallelize(network, gang, config))
    assert engine is not None
    statistics = []
    with engine.image():
        for step in range(steps + 1):
            network(timestep=_timestep(step), **inputs)
            statistics.append(engine.statistics)
    kept = statistics[1:]  # the first makes buffers
    return Timing(
        median(each.seconds for each in kept),
        median(each.wait_s for each in kept),
        kept[-1].waits,
        kept[-1].bytes_sent,
    )


def _time_theirs(network: FluxTransformer2DModel, ranks: int, inputs: dict[str, Any], steps: int) -> Timing:
    with torch.no_grad():
        with Collectives(ranks) as collectives:
            network(timestep=_timestep(0), return_dict=False, **inputs)
        seconds = []
        for step in range(steps):
            began = time.perf_counter()
            network(timestep=_timestep(step + 1), return_dict=False, **inputs)
            seconds.append(time.perf_counter() - began)
    sent = sum(collectives.sent) * (ranks - 1)
    return Timing(median(seconds), None, len(collectives.sent), sent)


def _timestep(step: int) -> torch.Tensor:
    return torch.tensor([0.9 - 0.01 * step])


if __name__ == "__main__":
    main()
