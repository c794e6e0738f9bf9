"""The cost of gangs on Ray: `python -m bench.gang`.

Starting a host; forming a gang on it (from the decision until its last rank can step); regrouping an
image 2 -> 4 -> 1 -> 2 between its steps; how far the pictures of gangs are from one worker's; losing a
worker to `kill -9` in mid-image.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import time
from dataclasses import dataclass
from statistics import median

from bench.arguments import add_json
from bench.likeness import largest_difference, psnr
from bench.report import Report
from distriray import GenerationRequest, GenerationResult, HostConfig, ParallelConfig
from distriray.arguments import at_least, positive
from distriray.gang import BlockingHost, open_host
from distriray.models import ModelSpec
from distriray.routing.latency import LatencyModel
from distriray.routing.policy import HostView, Plan, Workers

COLUMNS = ("what", "value")
PICTURES = [
    ParallelConfig(exchange=exchange, cfg_parallel=cfg_parallel)
    for exchange in ("sync", "displaced", "none")
    for cfg_parallel in (True, False)
]
GANGS: list[Workers] = [(0, 1), (0, 1, 2, 3), (2,), (2, 3)]


@dataclass
class Script:
    """The only request moves on to the next gang whenever it has made `every` steps more."""

    gangs: list[Workers]
    every: int = 1
    review_s: float | None = 0.005
    regroups: bool = True

    def plan(self, view: HostView, model: LatencyModel) -> Plan:
        (request,) = view.requests
        gang = self.gangs[min(request.steps_done // self.every, len(self.gangs) - 1)]
        return Plan({request.id: gang} if set(gang) <= set(view.workers) else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:landscapes")
    parser.add_argument("--size", type=positive, default=256, help="pixels of a side (default 256)")
    parser.add_argument("--steps", type=at_least(8), default=24)
    parser.add_argument("--rounds", type=positive, default=5)
    add_json(parser)
    options = parser.parse_args()

    report = Report("gangs on Ray, 4 CPU workers", COLUMNS, seed=1, settings=vars(options))
    policy = Script([(0,)])
    config = HostConfig(
        model=ModelSpec(name=options.model),
        workers=4,
        device="cpu",
        parallel=ParallelConfig(exchange="sync"),
    )
    began = time.perf_counter()
    with open_host(config, policy=policy, cpus=4) as host:
        status = host.status()
        report.add("host and Ray started, s", f"{time.perf_counter() - began:.1f}")
        report.add("model loaded, s, slowest worker", f"{max(w.load_s for w in status.workers):.1f}")
        report.add("memory of a worker, MB", f"{max(w.memory for w in status.workers) / 1e6:.0f}")

        def draw(
            gangs: list[Workers],
            steps: int = options.steps,
            every: int = 1,
            parallel: ParallelConfig | None = None,
        ) -> GenerationResult:
            policy.gangs, policy.every = gangs, every
            request = GenerationRequest(
                prompt="a lake at dusk, snowy mountains",
                height=options.size,
                width=options.size,
                num_inference_steps=steps,
                seed=1,
                parallel=parallel,
            )
            return host.generate(request)

        for gang in GANGS:
            draw([gang], steps=2)
        for gang in GANGS[:2] + [(2,)]:
            firsts = [draw([gang], steps=1).segments[0] for _ in range(options.rounds)]
            seconds = [segment.formed_at - segment.sent_at for segment in firsts]
            report.add(f"forming a gang of {len(gang)}, ms", f"{1e3 * median(seconds):.1f}")
        alone = draw([(0,)])
        moved = [draw(GANGS, every=options.steps // 4) for _ in range(options.rounds)]
        assert all([s.workers for s in result.segments] == GANGS for result in moved)
        report.add(
            "one regrouping, ms, beside its synchronous step",
            f"{1e3 * median(gap for result in moved for gap in _gaps(result)):.1f}",
        )
        report.add(
            "largest difference of a colour, 2 -> 4 -> 1 -> 2 against one worker, of 255",
            str(max(_difference(alone, result) for result in moved)),
        )
        for parallel in PICTURES:
            for gang in GANGS[:2]:
                result = draw([gang], parallel=parallel)
                split = "guidance split" if parallel.cfg_parallel else "patches only"
                way = f"{parallel.exchange}, {split}, {len(gang)} workers, against one worker"
                report.add(f"{way}: PSNR, dB", f"{psnr(alone.images[0], result.images[0]):.1f}")
                report.add(f"{way}: largest difference of a colour, of 255", str(_difference(alone, result)))
        _kill(host, policy, options, report)
    report.publish(options.json)


def _kill(host: BlockingHost, policy: Script, options: argparse.Namespace, report: Report) -> None:
    """`kill -9` of rank 1 of 4 in mid-image; it goes on with the two that are aligned and alive."""
    half = options.steps // 2
    request = GenerationRequest(
        prompt="x",
        id="hurt",
        height=options.size,
        width=options.size,
        seed=1,
        num_inference_steps=options.steps,
    )

    async def scene() -> tuple[GenerationResult, float, float]:
        policy.gangs = [(0, 1, 2, 3)]
        task = asyncio.ensure_future(host.host.generate(request))
        while not (running := host.host.status().running) or running[0].step < half:
            await asyncio.sleep(0.005)
        policy.gangs = [(2, 3)]
        killed = time.monotonic()
        os.kill(host.host.status().workers[1].pid, signal.SIGKILL)
        while not (running := host.host.status().running) or running[0].workers != (2, 3):
            await asyncio.sleep(0.001)
        resumed = time.monotonic() - killed
        result = await task
        while host.host.status().free_workers < 4:
            await asyncio.sleep(0.05)
        return result, resumed, host.host.status().repairs[-1].seconds

    result, resumed, repaired = host.do(scene())
    first, second = result.segments
    report.add("killed worker: steps kept of those done", f"{second.first_step} of {first.last_step}")
    report.add("killed worker: goes on with two others after, ms", f"{1e3 * resumed:.0f}")
    report.add("killed worker: replaced and in every gang after, s", f"{repaired:.1f}")


def _gaps(result: GenerationResult) -> list[float]:
    """Seconds between the last rank's leaving one gang and the last rank's readiness in the next."""
    pairs = zip(result.segments, result.segments[1:], strict=False)
    return [after.formed_at - before.left_at for before, after in pairs]


def _difference(one: GenerationResult, other: GenerationResult) -> int:
    return largest_difference(one.images[0], other.images[0])


if __name__ == "__main__":
    main()
