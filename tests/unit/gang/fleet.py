"""Workers in the test's own event loop: gangs step, break and are linked, without Ray or a model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from PIL import Image

from distriray.denoise.pipelines.terms import Terms
from distriray.errors import DistrirayError, GangBroken
from distriray.gang.config import HostConfig
from distriray.gang.dispatcher import Dispatcher
from distriray.gang.job import Job
from distriray.gang.messages import (
    ALONE,
    GangMembership,
    Progress,
    RankResult,
    SegmentEnd,
    SegmentOrder,
    StateLost,
    StopSignal,
    WorkerFacts,
)
from distriray.gang.remote import WorkerDied
from distriray.picture import Picture
from distriray.routing.policies.earliest_deadline import EarliestDeadlineFirst
from distriray.routing.policy import HostPolicy
from distriray.steps import StepCount

from .runners import ask

CALLER: ContextVar[str | None] = ContextVar("CALLER", default=None)
"""Who a task runs for, as Ray's and Serve's own variables say it."""

STEP_S = 0.001
LONG = 10**6
"""More steps than a test waits for."""


@dataclass
class Sent:
    """A state on its way to other workers."""

    sender: FakeWorker
    step: int


class FakeWorker:
    """One process. A test may let it `die`, and set what it `raises` or `refuses`, whether it `hangs`, and
    whether it is `mute`: it cannot send the states that it has.

    One that is `stuck`, before its first step ("prepare"), in a later "step" or in its "decode", answers all
    else.
    """

    def __init__(self, fleet: FakeFleet, index: int) -> None:
        self.fleet, self.index = fleet, index
        self.alive = True
        self.hangs = self.mute = False
        self.stuck = fleet.stuck.get(index, "")
        self.raises: Exception | None = None
        self.refuses: DistrirayError | None = None
        self.states: dict[int, int] = {}
        self.communicators: set[str] = {ALONE}
        self.signals: dict[int, StopSignal] = {}
        self.retained: list[tuple[set[int], int]] = []
        self.pictures: list[tuple[int, Mapping[str, Picture] | None]] = []
        self._death: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._death.add_done_callback(lambda death: death.exception())

    def die(self) -> None:
        """As by `kill -9`."""
        if self.alive:
            self.alive = False
            self._death.set_exception(WorkerDied(f"worker {self.index}"))

    kill = die

    def load(self) -> asyncio.Future[WorkerFacts]:
        async def load() -> WorkerFacts:
            await asyncio.sleep(self.fleet.load_s)
            if self.fleet.load_raises.get(self.index) is not None:
                raise self.fleet.load_raises[self.index]
            return WorkerFacts(
                pid=id(self), device=self.fleet.device, device_name="cpu", model="m",
                default_size=(128, 128), size_unit=8, row_unit=16, cuts_vae=self.fleet.cuts_vae,
                load_s=0.0, memory=1, own_steps=self.fleet.own_steps, guides=self.fleet.guides,
                terms=self.fleet.terms, key_heads=self.fleet.key_heads,
                has_short_steps=self.fleet.has_short_steps,
            )  # fmt: skip

        return self._call(load())

    def link(self, links: Sequence[GangMembership]) -> asyncio.Future[None]:
        async def link() -> None:
            if self.raises is not None:
                raise self.raises
            await asyncio.sleep(0.001)
            self.fleet.linked_beside |= any(not gang.over for gang in self.fleet.gangs.values())
            for one in links:
                peers = [self.fleet.at(index) for index in one.group]
                if any(peer.hangs or peer.raises is not None for peer in peers):
                    await asyncio.sleep(self.fleet.timeout_s)
                    raise GangBroken(f"not all of {one.group} came")
                self.communicators.add(one.name)

        return self._call(link())

    def run(
        self, order: SegmentOrder, state: Sent | None, pictures: Mapping[str, Picture] | None
    ) -> asyncio.Future[RankResult]:
        self.pictures.append((order.job, pictures))
        return self._call(self._run(order, state))

    def share(self, pictures: Mapping[str, Picture]) -> Mapping[str, Picture]:
        self.fleet.shared += 1
        return pictures

    def export(self, job: int) -> Sent:
        return Sent(self, self.states[job])

    def watch(self, serial: int, seen: int) -> asyncio.Future[Progress]:
        async def watch() -> Progress:
            while True:
                gang = self.fleet.gangs.get(serial)
                if gang is None or gang.over:
                    return Progress(0, 0, True)
                if gang.step > seen:
                    return Progress(gang.step, gang.steps, False)
                await asyncio.sleep(STEP_S)

        return self._call(watch())

    def stop(self, serial: int, signal: StopSignal) -> None:
        self.signals[serial] = signal

    def retain(self, jobs: Collection[int], newest: int) -> None:
        self.retained.append((set(jobs), newest))
        self.states = {job: step for job, step in self.states.items() if job > newest or job in jobs}

    def ping(self) -> asyncio.Future[tuple[int, int]]:
        async def ping() -> tuple[int, int]:
            while self.hangs:
                await asyncio.sleep(STEP_S)
            return 2, len(self.states)

        return self._call(ping())

    def until_death(self) -> asyncio.Future[None]:
        return asyncio.shield(self._death)

    async def _run(self, order: SegmentOrder, state: Sent | None) -> RankResult:
        if state is not None:
            if not state.sender.alive or state.sender.mute:
                raise StateLost("its sender died, or cannot")
            self.states[order.job] = state.step
        elif order.step == 0:
            self.states[order.job] = 0
        if self.raises is None and self.refuses is None:
            assert self.states[order.job] == order.step, "the host takes this worker for a holder"
        assert order.communicator in self.communicators
        gang = self.fleet.gangs.setdefault(order.serial, FakeGang(order))
        return await gang.run(self, order)

    def _call(self, work: Any) -> asyncio.Future[Any]:
        self.fleet.callers.append(CALLER.get())

        async def until_death() -> Any:
            task = asyncio.ensure_future(work)
            await asyncio.wait([task, self._death], return_when=asyncio.FIRST_COMPLETED)
            if not self.alive:
                task.cancel()
                raise WorkerDied(f"worker {self.index}")
            return task.result()

        answer = asyncio.ensure_future(until_death())
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        return answer


class FakeGang:
    """The ranks of one segment, in step with each other."""

    def __init__(self, order: SegmentOrder) -> None:
        self.serial, self.job = order.serial, order.job
        self.first = self.step = order.step
        self.steps = order.request.num_inference_steps
        self.size = 1 if order.communicator == ALONE else len(order.communicator.split(".")[0].split("-"))
        self.members: list[FakeWorker] = []
        self.over = False
        self._stepping: asyncio.Task[SegmentEnd] | None = None

    async def run(self, worker: FakeWorker, order: SegmentOrder) -> RankResult:
        self.members.append(worker)
        if len(self.members) == self.size:
            self._stepping = asyncio.ensure_future(self._steps())
        waits = round(worker.fleet.timeout_s / STEP_S)  # counted: a busy machine is no silent peer
        while self._stepping is None:
            await asyncio.sleep(STEP_S)
            waits -= 1
            if waits < 0:
                self.over = True
                return RankResult(SegmentEnd.BROKEN, order.step, cause="a peer did not come", broken=True)
        ending = await asyncio.shield(self._stepping)
        while worker.hangs or (worker.stuck == "decode" and order.rank == 0):
            await asyncio.sleep(STEP_S)
        fields: dict[str, Any] = {"exchange": order.parallel.exchange}
        if ending is SegmentEnd.BROKEN:
            fields |= {"cause": "a peer is gone", "broken": True}
        if worker.raises is not None and ending is not SegmentEnd.DONE:
            ending = SegmentEnd.FAILED
            fields |= {"cause": str(worker.raises), "broken": True}
        if ending is SegmentEnd.NOT_BEGUN and worker.refuses is not None:
            ending = SegmentEnd.REFUSED
            fields |= {"error": worker.refuses}
        if ending is SegmentEnd.DONE and order.rank == 0:
            fields |= {"images": [Image.new("RGB", (8, 8))], "warnings": worker.fleet.warnings}
        step = worker.states.get(self.job, self.first)
        return RankResult(ending, step, fresh_s=(STEP_S,), formed_at=1.0, left_at=1.0, **fields)

    async def _steps(self) -> SegmentEnd:
        try:
            if any(member.refuses for member in self.members):
                return SegmentEnd.NOT_BEGUN
            while self.step < self.steps:
                if any(member.stuck == ("step" if self.step else "prepare") for member in self.members):
                    await asyncio.sleep(STEP_S)
                    continue
                if any(not member.alive or member.raises is not None for member in self.members):
                    return SegmentEnd.BROKEN
                if any(member.hangs for member in self.members):
                    await asyncio.sleep(self.members[0].fleet.timeout_s)
                    return SegmentEnd.BROKEN
                signals = {member.signals.get(self.serial) for member in self.members}
                if StopSignal.CANCEL in signals:
                    return SegmentEnd.CANCELLED
                if StopSignal.YIELD in signals and self.step > self.first:
                    return SegmentEnd.YIELDED
                await asyncio.sleep(STEP_S)
                self.step += 1
                for member in self.members:
                    member.states[self.job] = self.step
            return SegmentEnd.DONE
        finally:
            self.over = True


class FakeFleet:
    """The processes of one host.

    Attributes:
        callers: for whom each call to a worker was made.
        shared: how often pictures were put where workers get them.
        linked_beside: whether gangs were formed while others worked.
    """

    def __init__(self, timeout_s: float = 0.05) -> None:
        self.timeout_s = timeout_s
        self.device = "cpu"
        self.linked_beside = False
        self.cuts_vae = True
        self.stuck: dict[int, str] = {}
        self.warnings: tuple[str, ...] = ()
        self.own_steps, self.guides, self.terms = StepCount(), True, Terms()
        self.key_heads: int | None = None
        self.has_short_steps = True
        self.load_s = 0.005
        self.load_raises: dict[int, Exception] = {}
        self.launched: list[FakeWorker] = []
        self.gangs: dict[int, FakeGang] = {}
        self.callers: list[str | None] = []
        self.shared = 0

    def __call__(self, index: int) -> FakeWorker:
        self.callers.append(CALLER.get())
        self.launched.append(FakeWorker(self, index))
        return self.launched[-1]

    def at(self, index: int) -> FakeWorker:
        """Who is in a place now."""
        return next(worker for worker in reversed(self.launched) if worker.index == index)


class FakeHost:
    """A dispatcher over a fake fleet."""

    def __init__(self, workers: int = 2, policy: HostPolicy | None = None, **config: Any) -> None:
        self.fleet = FakeFleet()
        self.config = HostConfig.model_validate(
            {"workers": workers, "timeout_s": self.fleet.timeout_s, "device": "cpu", **config}
        )
        self.dispatcher = Dispatcher(self.config, self.fleet, policy or EarliestDeadlineFirst())

    async def __aenter__(self) -> FakeHost:
        await self.dispatcher.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.dispatcher.close()

    def accept(self, **fields: Any) -> Job:
        return self.dispatcher.accept(ask(**fields))

    async def whole(self) -> None:
        """Wait until all workers can be lent."""
        await until(lambda: len(self.dispatcher.free) == self.config.workers)


async def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Wait for `condition`; a test that waits in vain fails."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(STEP_S)
