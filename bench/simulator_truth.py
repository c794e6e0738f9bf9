"""`python -m bench.simulator_truth`: the same trace on a real host and in the simulator."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from distriray.routing.elastic import Elastic
from distriray.routing.latency import LatencyModel, Profile
from distriray.routing.report import Report
from distriray.routing.simulator import Fleet, simulate
from distriray.routing.workload import Arrival

Submit = Callable[[Arrival], Awaitable[None]]


def trace(
    count: int, model: LatencyModel, size: tuple[int, int], steps: int, workers: int, seed: int
) -> list[Arrival]:
    """Requests of one size that keep a host about 70 % busy, due in 1 to 4 times what one worker takes."""
    draw = random.Random(seed)
    alone = model.times(1, *size, 1).run_s(0, steps)
    at, arrivals = 0.0, []
    for _ in range(count):
        at += draw.expovariate(0.7 * workers / alone)
        height, width = size
        deadline = alone * draw.uniform(1.0, 4.0)
        arrivals.append(Arrival(at_s=at, height=height, width=width, steps=steps, deadline_s=deadline))
    return arrivals


async def replay(arrivals: Sequence[Arrival], submit: Submit, workers: int) -> Report:
    """Submit each request at its time, whatever became of the others, and wait for all."""
    report = Report(
        workers, arrived=len(arrivals), with_deadline=sum(a.deadline_s is not None for a in arrivals)
    )
    start = time.monotonic()

    async def one(arrival: Arrival) -> None:
        await asyncio.sleep(max(0.0, start + arrival.at_s - time.monotonic()))
        await submit(arrival)
        took = time.monotonic() - start - arrival.at_s
        report.latency.add(took)
        report.met += arrival.deadline_s is not None and took <= arrival.deadline_s
        report.span_s = time.monotonic() - start

    await asyncio.gather(*(one(arrival) for arrival in arrivals))
    return report


def compare(real: Report, simulated: Report) -> dict[str, float]:
    """Deadlines met and mean latency of both, and how far apart they are."""
    a, b = real.row(), simulated.row()
    return {
        "real: deadlines met %": a["deadlines met %"],
        "simulated": b["deadlines met %"],
        "apart, points": abs(a["deadlines met %"] - b["deadlines met %"]),
        "real: mean s": a["mean s"],
        "simulated ": b["mean s"],
        "apart, %": 100.0 * abs(a["mean s"] - b["mean s"]) / a["mean s"],
    }


async def on_a_host(workers: int, count: int, steps: int, seed: int) -> dict[str, float]:
    """Start a host of CPU workers with the elastic policy, profile it, and run the trace both ways."""
    from distriray.gang import Host, HostConfig
    from distriray.requests import GenerationRequest

    with tempfile.TemporaryDirectory() as folder:
        host = await Host.start(
            HostConfig(
                workers=workers, device="cpu", policy="elastic", profiles=Path(folder), max_queue=count
            )
        )
        try:
            profile = Profile.load(next(Path(folder).glob("*.json")))
            model = LatencyModel(profile)
            size = (profile.entries[0].height, profile.entries[0].width)
            arrivals = trace(count, model, size, steps, workers, seed)

            async def submit(arrival: Arrival) -> None:
                await host.generate(
                    GenerationRequest(
                        prompt="a lake",
                        seed=0,
                        height=arrival.height,
                        width=arrival.width,
                        num_inference_steps=arrival.steps,
                        deadline_s=arrival.deadline_s,
                    )
                )

            real = await replay(arrivals, submit, workers)
        finally:
            await host.close()
    sizes = tuple(sorted({entry.gang for entry in profile.entries}))
    return compare(real, simulate(arrivals, Elastic(), model, Fleet(workers=workers, gang_sizes=sizes)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print how far the simulator is from a real host."""
    parser = argparse.ArgumentParser(prog="python -m bench.simulator_truth", description=__doc__)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    row = asyncio.run(on_a_host(options.workers, options.requests, options.steps, options.seed))
    print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
    print(f"| {' | '.join(f'{value:.3g}' for value in row.values())} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
