"""A host whose workers share this process and one device: their gangs compute in lock-step.

Everything is a host's own but for two things: workers are no actors of Ray, and the ranks of a gang take
turns, so that one GPU is enough, and none too.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from distriray.collective import serve_store
from distriray.gang import runner
from distriray.gang.config import HostConfig
from distriray.gang.dispatcher import Dispatcher
from distriray.gang.messages import (
    GangMembership,
    Progress,
    RankResult,
    SegmentOrder,
    StopSignal,
    WorkerFacts,
)
from distriray.gang.remote import WorkerDied
from distriray.gang.worker import Worker
from distriray.picture import Picture
from distriray.requests import GenerationRequest
from distriray.results import GenerationResult
from distriray.routing.policies.earliest_deadline import EarliestDeadlineFirst

from .turns import Rank, Turns


def one_at_a_time(load: Callable[..., Any]) -> Callable[..., Any]:
    """`load` for several threads: while one makes a network on the meta device, no other may make any."""
    turn = threading.Lock()

    def loads(*args: Any) -> Any:
        with turn:
            return load(*args)

    return loads


class InProcess:
    """A `RemoteWorker` around a worker of this process."""

    def __init__(self, config: HostConfig, device: str, store: str) -> None:
        self.worker = Worker(config, device, store)
        self._death: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._death.add_done_callback(lambda death: death.exception())

    def kill(self) -> None:
        """Its gangs hear of it, as they would of a process that has died, and it is never heard of again."""
        if self._death.done():
            return
        self._death.set_exception(WorkerDied("it was killed"))
        segments = self.worker._runner
        for communicator in () if segments is None else segments._communicators.values():
            if isinstance(communicator, Rank):
                communicator.close()

    def load(self) -> asyncio.Future[WorkerFacts]:
        return self._answer(self.worker.load())

    def link(self, links: Sequence[GangMembership]) -> asyncio.Future[None]:
        return self._answer(self.worker.link(links))

    def run(
        self, order: SegmentOrder, state: asyncio.Task[bytes] | None, pictures: Any
    ) -> asyncio.Future[RankResult]:
        async def run() -> RankResult:
            return await self.worker.run(order, None if state is None else await state, pictures)

        return self._answer(run())

    def share(self, pictures: Mapping[str, Picture]) -> Mapping[str, Picture]:
        return pictures

    def export(self, job: int) -> asyncio.Task[bytes]:
        return asyncio.ensure_future(self.worker.export(job))

    def watch(self, serial: int, seen: int) -> asyncio.Future[Progress]:
        return self._answer(self.worker.watch(serial, seen))

    def stop(self, serial: int, signal: StopSignal) -> None:
        self._answer(self.worker.stop(serial, signal))

    def retain(self, jobs: Collection[int], newest: int) -> None:
        self._answer(self.worker.retain(jobs, newest))

    def ping(self) -> asyncio.Future[tuple[int, int]]:
        return self._answer(self.worker.ping())

    def until_death(self) -> asyncio.Future[None]:
        return asyncio.shield(self._death)

    def _answer(self, work: Any) -> asyncio.Future[Any]:
        async def or_death() -> Any:
            task = asyncio.ensure_future(work)
            await asyncio.wait([task, self._death], return_when=asyncio.FIRST_COMPLETED)
            if self._death.done():
                self._death.result()
            return task.result()

        answer = asyncio.ensure_future(or_death())
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        return answer


class OneDevice:
    """A host of two workers on `device`; `async with` starts it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device: str, **config: Any) -> None:
        Turns().install(monkeypatch)
        monkeypatch.setattr(runner, "load_pipeline", one_at_a_time(runner.load_pipeline))
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        monkeypatch.setattr(ray, "get_gpu_ids", lambda: [gpu])
        context = SimpleNamespace(get_node_id=lambda: "here")
        monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
        self.config = HostConfig.model_validate({"workers": 2, "device": device, **config})
        self._store = serve_store("127.0.0.1")
        self.workers: list[InProcess] = []
        self.dispatcher = Dispatcher(self.config, self._launch, EarliestDeadlineFirst())

    def _launch(self, index: int) -> InProcess:
        self.workers.append(InProcess(self.config, self.config.device, self._store.address))
        return self.workers[-1]

    async def __aenter__(self) -> OneDevice:
        await self.dispatcher.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.dispatcher.close()

    async def draw(self, request: GenerationRequest) -> GenerationResult:
        return await self.dispatcher.accept(request).ended
