"""Time of one image, end to end: `python -m bench.speed`.

diffusers alone with one thread and with all threads, and gangs of 1, 2 and 4 ranks with one thread each, in
every mode, with the guidance branches split between the halves of the gang (`cfg_parallel`) or not. All take
turns within one run, round by round, so that a machine whose speed drifts shifts them alike; ratios are
medians of the rounds' ratios. The phases of a gang's image are taken apart: prompt, denoising, what of it was
spent waiting for peers, and decoding; a host on Ray adds what the last column of its rows says.

    python -m bench.speed --device cuda --model stabilityai/stable-diffusion-xl-base-1.0 --sizes 1024 2048
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, product
from statistics import median
from typing import Any

import torch

from bench.arguments import add_json, side
from bench.barrier import barrier, finish
from bench.report import Report
from distriray import GenerationRequest, HostConfig, ParallelConfig, SamplingParams, parallelize
from distriray.arguments import at_least, positive
from distriray.collective import Communicator, connect, launch
from distriray.denoise import Denoiser
from distriray.models import ModelSpec, load_pipeline
from distriray.parallel import engine_of

PROMPT = "a lake at dusk, snowy mountains"
ALONE = "diffusers, one thread"
COLUMNS = (
    "size",
    "way",
    "faster than diffusers alone",
    "image, s",
    "prompt, s",
    "denoising, s",
    "of it waiting, s",
    "decoding, s",
    "service, s",
)


@dataclass(frozen=True)
class Way:
    """One way to make the image: by `ranks` processes, or (0) by diffusers alone with `threads`."""

    name: str
    ranks: int = 0
    threads: int = 1
    parallel: ParallelConfig = ParallelConfig()


@dataclass(frozen=True)
class Phases:
    """Seconds of one image; phases that were not told apart are None."""

    image: float
    prompt: float | None = None
    denoising: float | None = None
    waiting: float | None = None
    decoding: float | None = None
    service: float | None = None


Round = dict[tuple[int, str], Phases]
"""By size and name of the way."""


def ways(gangs: list[int], device: str, intervals: Sequence[int] = ()) -> list[Way]:
    """Everything that is compared; with the guidance split, a gang of 2 has nothing to exchange.

    Args:
        intervals: `cache_interval` of further gangs, which wait for fresh values.
    """
    found = [Way(ALONE if device == "cpu" else "diffusers")]
    if device == "cpu":
        found.append(Way("diffusers, all threads", threads=os.cpu_count() or 1))
    for ranks in gangs:
        if ranks == 1:
            found.append(Way("gang of 1", 1))
            continue
        for exchange in ("displaced", "sync", "none"):
            for split in (True, False):
                if split and (ranks % 2 or (ranks == 2 and exchange != "displaced")):
                    continue
                name = f"gang of {ranks}, " + (
                    "guidance split" if split and ranks == 2 else exchange + (", guidance split" * split)
                )
                config = ParallelConfig.model_validate({"exchange": exchange, "cfg_parallel": split})
                found.append(Way(name, ranks, parallel=config))
    fresh = [way for way in found if way.ranks == 1 or way.parallel.exchange == "sync"]
    for way, interval in product(fresh, intervals):
        config = way.parallel.model_copy(update={"cache_interval": interval})
        found.append(Way(f"{way.name}, one of {interval} steps whole", way.ranks, parallel=config))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="builtin:landscapes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", help="how ranks exchange; default: the best that there is")
    parser.add_argument("--sizes", type=side, nargs="+", default=[256, 512, 768], help="pixels of a side")
    parser.add_argument("--gangs", type=positive, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=positive, default=10)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument(
        "--cache-intervals", type=at_least(2), nargs="+", default=(), help="gangs with short steps too"
    )
    parser.add_argument("--no-host", action="store_true", help="leave out the hosts, which need Ray")
    add_json(parser)
    arguments = parser.parse_args()
    compared = ways(arguments.gangs, arguments.device, arguments.cache_intervals)
    report = Report(
        f"bench.speed: one image of {arguments.model}, {arguments.steps} steps with guidance",
        COLUMNS,
        seed=0,
        settings=vars(arguments),
    )
    how = {"device": arguments.device, "backend": arguments.backend}
    rounds = launch(max(arguments.gangs), measure, compared, arguments, **how)[0]
    hosted = [] if arguments.no_host else measure_host(arguments)
    for size in arguments.sizes:
        for way in compared:
            base = compared[0].name
            ratio = median(r[size, base].image / r[size, way.name].image for r in rounds)
            _add(report, size, way.name, f"{ratio:.2f}x", [r[size, way.name] for r in rounds])
        for name in dict.fromkeys(name for of_size, name in chain(*hosted[:1]) if of_size == size):
            _add(report, size, name, "-", [r[size, name] for r in hosted])
    report.publish(arguments.json)


def _add(report: Report, size: int, name: str, ratio: str, taken: list[Phases]) -> None:
    def cell(phase: str) -> str:
        values = [getattr(phases, phase) for phases in taken]
        return "-" if None in values else f"{median(values):.3f}"

    phases = ("image", "prompt", "denoising", "waiting", "decoding", "service")
    report.add(f"{size}x{size}", name, ratio, *map(cell, phases))


def measure(communicator: Communicator, compared: list[Way], arguments: argparse.Namespace) -> list[Round]:
    """Rank 0's seconds of every way at every size, round by round; ranks that a way leaves out wait."""
    spec = ModelSpec(name=arguments.model)
    pipeline = load_pipeline(spec, communicator.device)
    untouched = load_pipeline(spec, communicator.device) if communicator.rank == 0 else None
    rounds: list[Round] = []
    for _ in range(arguments.rounds + 1):
        taken = {}
        for size in arguments.sizes:
            for way in compared:
                barrier(communicator)
                if communicator.rank < max(way.ranks, 1):
                    if way.ranks:
                        taken[size, way.name] = _by_gang(pipeline, communicator, way, size, arguments.steps)
                    else:
                        taken[size, way.name] = _alone(untouched, way.threads, size, arguments.steps)
        barrier(communicator)
        rounds.append(taken)
    return rounds[1:]  # the first one met every shape and kind of step for the first time


def _alone(pipeline: Any, threads: int, size: int, steps: int) -> Phases:
    """diffusers' own pipeline, as a user calls it."""
    torch.set_num_threads(threads)
    try:
        began = _now(pipeline.device)
        pipeline(
            PROMPT,
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(0),
        )
        return Phases(_now(pipeline.device) - began)
    finally:
        torch.set_num_threads(1)


def _by_gang(pipeline: Any, communicator: Communicator, way: Way, size: int, steps: int) -> Phases:
    gang = communicator.subgroup(range(way.ranks))
    alone = way.ranks == 1
    parallelize(pipeline, connect("local", device=communicator.device) if alone else gang, way.parallel)
    denoiser, engine = Denoiser(pipeline), engine_of(pipeline)
    assert engine is not None
    began = _now(communicator.device)
    params = SamplingParams(
        prompt=PROMPT, seed=0, height=size, width=size, num_inference_steps=steps, guidance_scale=5.0
    )
    state = denoiser.prepare(params)
    prepared, waiting = _now(communicator.device), 0.0
    while not state.done:
        denoiser.step(state)
        waiting += engine.statistics.wait_s
    denoised = _now(communicator.device)
    if communicator.rank == 0 or engine.decodes_together:
        denoiser.decode(state)
    ended = _now(communicator.device)
    return Phases(ended - began, prepared - began, denoised - prepared, waiting, ended - denoised)


def measure_host(arguments: argparse.Namespace) -> list[Round]:
    """The same image asked of a host on Ray; `service` is what no phase of its workers explains."""
    from distriray.gang import open_host  # with Ray, which the rest does without

    rounds: list[Round] = []
    config = HostConfig(
        model=ModelSpec(name=arguments.model), workers=max(arguments.gangs), device=arguments.device
    )
    with open_host(config, cpus=None if arguments.device == "cuda" else config.workers) as host:
        for _ in range(arguments.rounds + 1):
            taken = {}
            for size in arguments.sizes:
                for ranks in arguments.gangs:
                    request = GenerationRequest(
                        prompt=PROMPT,
                        height=size,
                        width=size,
                        num_inference_steps=arguments.steps,
                        seed=0,
                        gang_size=ranks,
                    )
                    t = host.generate(request).timings
                    taken[size, f"host on Ray, gang of {ranks}"] = Phases(
                        t.total_s, t.prepare_s, t.denoise_s, None, t.decode_s, t.queued_s + t.waiting_s
                    )
            rounds.append(taken)
    return rounds[1:]


def _now(device: torch.device) -> float:
    finish(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
