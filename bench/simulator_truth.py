"""`python -m bench.simulator_truth`: the same traces on a real host and in the simulator.

The simulator gets the host's profile: as measured at its start; as the traces before this one had corrected
it, which is what the host itself plans this one with; and, for comparison, as this one corrected it.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from bench.arguments import add_json
from bench.report import Report
from distriray.arguments import positive, positive_number
from distriray.models import ModelSpec
from distriray.requests import GenerationRequest
from distriray.results import Segment
from distriray.routing.latency import LatencyModel
from distriray.routing.policies.elastic import Elastic
from distriray.routing.profile import Profile
from distriray.routing.simulation.fleet import SimulatedFleet
from distriray.routing.simulation.report import TraceReport
from distriray.routing.simulation.simulator import simulate
from distriray.routing.simulation.workload import Arrival

Submit = Callable[[Arrival], Awaitable[Sequence[Segment]]]


def trace(
    count: int,
    model: LatencyModel,
    size: tuple[int, int],
    steps: int,
    workers: int,
    seed: int,
    load: float = 0.7,
) -> list[Arrival]:
    """Requests that keep such a share of a host busy, due in 0.4 to 1.5 times what one worker takes."""
    draw = random.Random(seed)
    alone = model.times(1, *size, 1).run_s(0, steps)
    at, arrivals = 0.0, []
    for _ in range(count):
        at += draw.expovariate(load * workers / alone)
        height, width = size
        deadline = alone * draw.uniform(0.4, 1.5)
        arrivals.append(Arrival(at_s=at, height=height, width=width, steps=steps, deadline_s=deadline))
    return arrivals


async def replay(arrivals: Sequence[Arrival], submit: Submit, workers: int) -> TraceReport:
    """Submit each request at its time, whatever became of the others, and wait for all."""
    report = TraceReport(
        workers, arrived=len(arrivals), with_deadline=sum(a.deadline_s is not None for a in arrivals)
    )
    start = time.monotonic()

    async def one(arrival: Arrival) -> None:
        await asyncio.sleep(max(0.0, start + arrival.at_s - time.monotonic()))
        segments = await submit(arrival)
        took = time.monotonic() - start - arrival.at_s
        report.latency.add(took)
        report.met += arrival.deadline_s is not None and took <= arrival.deadline_s
        report.span_s = time.monotonic() - start
        report.worker_seconds += sum(len(segment.workers) * segment.seconds for segment in segments)
        report.regroupings += len(segments) - 1

    await asyncio.gather(*(one(arrival) for arrival in arrivals))
    return report


def compare(real: TraceReport, simulated: TraceReport) -> dict[str, float]:
    """Deadlines met and mean latency of both, and how far apart they are."""
    a, b = real.row(), simulated.row()
    return {
        "real: deadlines met %": a["deadlines met %"],
        "simulated": b["deadlines met %"],
        "apart, points": abs(a["deadlines met %"] - b["deadlines met %"]),
        "real: mean s": a["mean s"],
        "simulated ": b["mean s"],
        "apart, %": 100.0 * abs(a["mean s"] - b["mean s"]) / a["mean s"],
        "real: regroupings/image": a["regroupings/image"],
        "simulated  ": b["regroupings/image"],
        "real: utilisation %": a["utilisation %"],
        "simulated   ": b["utilisation %"],
    }


class Others:
    """Cores that processes other than this one and its children keep busy, on average since the last look."""

    def __init__(self) -> None:
        self._last = self._seconds()

    def cores(self) -> float:
        last, self._last = self._last, self._seconds()
        wall, busy, own = (now - then for now, then in zip(self._last, last, strict=True))
        return max(0.0, (busy - own) / wall)

    @staticmethod
    def _seconds() -> tuple[float, float, float]:
        times = psutil.cpu_times()
        own = 0.0
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            with suppress(psutil.Error):  # it has just ended
                own += sum(process.cpu_times()[:2])
        return time.monotonic(), sum(times) - times.idle - times.iowait - times.guest - times.guest_nice, own


def on_a_host(options: argparse.Namespace) -> tuple[Profile, list[dict[str, Any]], dict[str, Any]]:
    """Profile a host of CPU workers with the elastic policy, and run a trace for each seed both ways."""
    from distriray.gang import HostConfig, open_host

    workers = options.workers
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        config = HostConfig(
            model=ModelSpec(name=options.model),
            workers=workers,
            device="cpu",
            policy="elastic",
            profiles=Path(folder),
            max_queue=options.requests,
        )
        others = Others()
        with open_host(config, cpus=workers) as host:
            disturbed = {"while the profile was measured": others.cores()}
            profile = Profile.load(next(Path(folder).glob("*.json")))
            size = (profile.entries[0].height, profile.entries[0].width)
            sizes = tuple(entry.gang for entry in profile.entries)
            fleet = SimulatedFleet(workers=workers, gang_sizes=sizes)

            async def submit(arrival: Arrival) -> Sequence[Segment]:
                request = GenerationRequest(
                    prompt="a lake",
                    seed=0,
                    height=arrival.height,
                    width=arrival.width,
                    num_inference_steps=arrival.steps,
                    deadline_s=arrival.deadline_s,
                )
                return (await host.host.generate(request)).segments

            for seed in options.seeds:
                model = LatencyModel(profile)
                arrivals = trace(options.requests, model, size, options.steps, workers, seed, options.load)
                before = copy.deepcopy(host.host.latency)
                others.cores()
                real = host.do(replay(arrivals, submit, workers))
                disturbed[f"while trace {seed} ran"] = others.cores()
                truths = {
                    "as measured at start": model,
                    "as the traces before had corrected it": before,
                    "as this trace corrected it": host.host.latency,
                }
                for name, truth in truths.items():
                    row = compare(real, simulate(arrivals, Elastic(), truth, fleet))
                    rows.append({"profile": name, "seed": seed, "requests": options.requests, **row})
            told = {
                "predictions at acceptance, actual over predicted": host.status().predictions.model_dump(),
                "step_s learned": {gang: host.host.latency.step_s(gang, *size, 1) for gang in sizes},
                "cores that other processes kept busy": disturbed,
            }
    return profile, rows, told


def main(arguments: Sequence[str] | None = None) -> int:
    """Print how far the simulator is from a real host."""
    parser = argparse.ArgumentParser(prog="python -m bench.simulator_truth", description=__doc__)
    parser.add_argument("--model", default="builtin:landscapes")
    parser.add_argument("--workers", type=positive, default=4)
    parser.add_argument("--requests", type=positive, default=60)
    parser.add_argument("--steps", type=positive, default=10)
    parser.add_argument(
        "--load", type=positive_number, default=0.7, help="of what its workers can do one by one"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="a trace each")
    add_json(parser)
    options = parser.parse_args(arguments)
    profile, rows, told = on_a_host(options)
    settings = {
        "command": "python -m bench.simulator_truth " + " ".join(arguments or sys.argv[1:]),
        "load": options.load,
        "profile": profile.model_dump(),
        **told,
    }
    table = Report("a host and its simulation", tuple(rows[0]), seed=options.seeds[0], settings=settings)
    for row in rows:
        table.add(*(value if isinstance(value, str) else f"{value:.4g}" for value in row.values()))
    table.publish(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
