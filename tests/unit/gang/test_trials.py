"""Faults at the worst moments of a gang's life, by the dozen, while requests grow, shrink, move and pause."""

from __future__ import annotations

import asyncio
import random
import selectors
import time
from collections.abc import Callable

import pytest

from distriray.errors import GenerationCancelled
from distriray.gang.job import Job, JobState
from distriray.gang.messages import ALONE, SegmentEnd, SegmentOrder
from distriray.results import GenerationResult
from distriray.routing.policies.earliest_deadline import EarliestDeadlineFirst
from tests.gang.policies import Changeable, Shuffle

from . import fleet
from .fleet import STEP_S, FakeGang, FakeHost, FakeWorker, until

Deed = Callable[["Trial", FakeWorker], None]


class Jumping(selectors.DefaultSelector):
    """A clock that jumps to the next moment at which something happens: one that never comes is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("nothing will ever happen again")
        self.now_s += max(timeout, 1e-7)
        return super().select(0)


class Restless(Shuffle):
    review_s = 4 * STEP_S


class Trial:
    """A host of four workers, what it was asked for, and what befalls it; all of it follows from `seed`."""

    def __init__(self, seed: int) -> None:
        self.draw, self.policy = random.Random(seed), Changeable()
        self.policy.change(Restless(seed))
        silence_s, stall_s = self.draw.choice([0.5, 8.0]), self.draw.choice([2.0, 12.0])
        self.host = FakeHost(4, self.policy, max_attempts=30, silence_s=silence_s, stall_s=stall_s)
        self.jobs: list[Job] = []
        self.cancelled: dict[Job, bool] = {}  # and whether it had steps left
        self._passing: list[asyncio.TimerHandle] = []

    def ail(self, worker: FakeWorker, how: str, value: object, seconds: list[float]) -> None:
        """Let something ail a worker for one of `seconds`."""
        healthy = getattr(worker, how)
        setattr(worker, how, value)
        loop, seconds_ = asyncio.get_running_loop(), self.draw.choice(seconds)
        self._passing.append(loop.call_later(seconds_, setattr, worker, how, healthy))

    def cancel(self, *states: JobState) -> None:
        """Cancel a request that is in one of these states, if there is one."""
        if live := [job for job in self.jobs if job.state in states]:
            job = self.draw.choice(live)
            step = max(worker.states.get(job.number, 0) for worker in self.host.fleet.launched)
            self.cancelled.setdefault(job, step + 1 < job.num_steps)
            self.host.dispatcher.cancel(job)

    async def run(self) -> None:
        async with self.host:
            for _ in range(2):
                await self._round()
                await self._afterwards()
        assert not any(worker.alive for worker in self.host.fleet.launched)

    async def _round(self) -> None:
        draw, self.jobs = self.draw, []
        for _ in range(draw.randint(2, 6)):
            steps, gang_size = draw.randint(1, 40), draw.choice(["auto", 1, 2, 4])
            self.jobs.append(self.host.accept(num_inference_steps=steps, gang_size=gang_size))
        for _ in range(draw.randint(1, 4)):
            await asyncio.sleep(draw.choice([0.0, draw.uniform(0, 0.01), draw.uniform(0, 0.2)]))
            wanted, began = draw.choice([None, *JobState]), time.monotonic()
            while time.monotonic() < began + 0.1 and wanted not in (None, *(job.state for job in self.jobs)):
                await asyncio.sleep(STEP_S / 3)
            chosen = [job for job in self.jobs if job.state is wanted]
            hit = [place for job in chosen for place in job.workers or [worker.index for worker in job.held]]
            draw.choice(DEEDS)(self, self.host.fleet.at(draw.choice(hit or range(4))))
        await asyncio.wait([job.ended for job in self.jobs], timeout=1000)
        await until(lambda: all(timer.when() < time.monotonic() for timer in self._passing), 1000)

    async def _afterwards(self) -> None:
        """Who may have ended so, and whether the host is as it was."""
        host, dispatcher, group = self.host, self.host.dispatcher, self.host.dispatcher.group
        await asyncio.sleep(0)
        for job in self.jobs:
            assert job.state is JobState.ENDED, f"{job.request.id} is {job.state} at step {job.step}"
            end = job.ended.exception() or job.ended.result()
            if isinstance(end, GenerationResult):
                assert end.segments[-1].last_step == job.num_steps and not self.cancelled.get(job)
            else:
                assert job in self.cancelled and isinstance(end, GenerationCancelled), repr(end)
        await host.whole()
        await asyncio.sleep(6.0)  # who watches has told of what is over
        assert dispatcher.healthy and len(dispatcher.free) == 4 and not dispatcher.jobs
        alive = [worker for worker in host.fleet.launched if worker.alive]
        assert {id(member.remote) for member in group.members} == set(map(id, alive))
        assert not any(worker.states for worker in alive)
        self.policy.change(EarliestDeadlineFirst())
        for size in (4, 2, 2, 1, 1, 1, 1):
            result = await host.accept(gang_size=size, num_inference_steps=3).ended
            assert result.repairs == 0
        self.policy.change(Restless(self.draw.randrange(1000)))


def _both(trial: Trial, worker: FakeWorker) -> None:
    worker.die()
    trial.host.fleet.at((worker.index + trial.draw.randint(1, 3)) % 4).die()


def _with_its_successor(trial: Trial, worker: FakeWorker) -> None:
    worker.die()
    fleet_, when_s = trial.host.fleet, trial.draw.choice([0.001, 0.0055, 0.006, 0.007])  # it loads, it links
    asyncio.get_running_loop().call_later(when_s, lambda: fleet_.at(worker.index).die())


DEEDS: list[Deed] = [
    lambda _, worker: worker.die(),
    _both,
    _with_its_successor,
    lambda trial, worker: trial.ail(worker, "hangs", True, [0.005, 0.03, 0.2, 1.5, 7.0]),
    lambda trial, worker: trial.ail(worker, "mute", True, [0.01, 0.1]),
    lambda trial, worker: trial.ail(
        worker, "stuck", trial.draw.choice(["prepare", "step", "decode"]), [0.03, 7.0, 15.0]
    ),
    lambda trial, _: trial.cancel(*set(JobState) - {JobState.ENDED}),
    lambda trial, _: trial.cancel(JobState.YIELDING, JobState.BREAKING, JobState.DECODING),
    lambda trial, _: trial.policy.change(EarliestDeadlineFirst()),
]


class Brittle(FakeGang):
    """What has broken cannot be lent again, and each of its ranks may have made the last step, or not."""

    def __init__(self, order: SegmentOrder) -> None:
        super().__init__(order)
        self._communicator = order.communicator

    async def _steps(self) -> SegmentEnd:
        end = await super()._steps()
        for index, worker in enumerate(self.members if end is SegmentEnd.BROKEN else ()):
            worker.communicators -= {self._communicator} - {ALONE}
            if (self.serial + index) % 2 and self.step > self.first:
                worker.states[self.job] = self.step - 1
        return end


@pytest.mark.parametrize("seed", range(24))
def test_whatever_befalls_workers_every_request_ends_once_and_the_host_is_whole_again(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Jumping()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now_s)
    monkeypatch.setattr(fleet, "FakeGang", Brittle)
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(clock)) as runner:
        runner.run(Trial(seed).run())
