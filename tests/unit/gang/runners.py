"""Gangs of runners in threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch.distributed import HashStore

from distriray.adapters import AdapterSpec
from distriray.collective.messages import indexed
from distriray.config import ParallelConfig
from distriray.gang.messages import GangMembership, RankResult, SegmentEnd, SegmentOrder
from distriray.gang.runner import SegmentRunner
from distriray.models import ModelSpec
from distriray.requests import GenerationRequest

SYNC = ParallelConfig(exchange="sync")


def ask(**fields: Any) -> GenerationRequest:
    """A small request."""
    defaults = {"prompt": "a lake", "height": 128, "width": 128, "seed": 7, "num_inference_steps": 6}
    return GenerationRequest.parse({**defaults, **fields})


class Gang:
    """Runners that are linked with each other."""

    def __init__(self, model: Path, size: int, device: str = "cpu") -> None:
        store, place = HashStore(), indexed(device)
        spec = ModelSpec(name=str(model), dtype="float32")
        self.runners = [SegmentRunner(spec, place, store, timeout_s=10.0) for _ in range(size)]
        self._threads = ThreadPoolExecutor(size)
        self._serial = 0
        group, name = tuple(range(size)), "all"
        self._together(lambda rank, runner: runner.link([GangMembership(group, name, rank, size)]))

    def run(
        self,
        job: int | None = None,
        step: int = 0,
        link: str = "all",
        blob: bytes | None = None,
        adapters: tuple[AdapterSpec, ...] = (),
        parallel: ParallelConfig = SYNC,
        **fields: Any,
    ) -> list[RankResult]:
        """A segment of a job, a new one unless given."""
        self._serial += 1
        job = 1000 + self._serial if job is None else job
        request = ask(**{"num_inference_steps": 2, **fields})

        def one(rank: int, runner: SegmentRunner) -> RankResult:
            order = SegmentOrder(
                serial=self._serial,
                job=job,
                request=request.without_pictures(),
                step=step,
                communicator=link,
                rank=rank,
                parallel=parallel,
                preview_steps=request.preview_steps(request.num_inference_steps),
                adapters=adapters,
            )
            return runner.run(order, blob, request.pictures)

        return self._together(one)

    def _together(self, work: Callable[[int, SegmentRunner], Any]) -> list[Any]:
        return list(self._threads.map(work, range(len(self.runners)), self.runners))


def endings(outcomes: list[RankResult]) -> list[SegmentEnd]:
    assert not any(outcome.broken for outcome in outcomes)
    return [outcome.end for outcome in outcomes]
