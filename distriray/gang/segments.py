"""A segment on the host's side: a gang is sent off, followed, and comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from distriray.gang.config import HostConfig
from distriray.gang.job import Job
from distriray.gang.messages import Progress, RankResult, SegmentEnd, SegmentOrder, StateLost, WorkerId
from distriray.gang.patience import Patience
from distriray.gang.remote import RemoteWorker, WorkerDied
from distriray.gang.segment_result import SegmentResult
from distriray.gang.worker_group import WorkerGroup
from distriray.routing.latency import Times

WATCH_S = 0.05
"""Least time between two questions to rank 0 of a gang how far it is."""

GRACE_S = 5.0
"""How much longer than a gang's timeout a rank may take to leave once the others left and it could know."""


class RunningSegment:
    """One gang, sent off with one request when this is made. Its state goes to the members that lack it.

    Args:
        times: what this should take.

    Raises:
        LookupError: a member of the gang is not there, or its communicator is not.
    """

    def __init__(self, group: WorkerGroup, config: HostConfig, job: Job, times: Times) -> None:
        assert job.workers is not None
        self._group, self._job = group, job
        self._grace_s = config.timeout_s + GRACE_S
        longest_s = max(times.prepare_s + times.sync_step_s, times.step_s, times.decode_s)
        # a peer that hangs is found by the others, who must have had the time for it
        self._patience = Patience(max(config.stall_s, 2 * self._grace_s), longest_s, time.monotonic())
        members = [group.member(index) for index in job.workers]
        communicator = group.communicators.get(job.workers)
        if communicator is None or None in members:
            raise LookupError(f"workers {job.workers} are not linked; there is {sorted(group.communicators)}")
        gang = [member for member in members if member is not None]
        state, holders = None, job.holders
        self._sender: WorkerId | None = None
        if holders and not holders.issuperset(member.id for member in gang):
            self._sender = min(holders)
            sender = group.remote(self._sender)
            assert sender is not None, "a job loses its holders when they die"
            state = sender.export(job.number)
        self._stepped = self._trouble = False
        self._ranks: dict[WorkerId, RankResult] = {}
        self._lost: list[WorkerId] = []
        self._failures: list[str] = []
        self._mute: WorkerId | None = None
        self._unsent = ""
        self.workers = [member.id for member in gang]
        self._first: RemoteWorker = gang[0].remote
        begins = job.step == 0 and not holders
        pictures = self._first.share(job.pictures) if begins and job.pictures else None
        self._running: dict[asyncio.Future[RankResult], WorkerId] = {}
        for rank, member in enumerate(gang):
            order = SegmentOrder(
                serial=job.serial,
                job=job.number,
                request=job.request,
                step=job.step,
                communicator=communicator,
                rank=rank,
                parallel=job.request.shared(config.parallel),
                preview_steps=job.request.preview_steps(job.num_steps) if rank == 0 else frozenset(),
                adapters=job.adapters,
            )
            lacks = state is not None and member.id not in holders
            running = member.remote.run(order, state if lacks else None, pictures)
            self._running[running] = member.id

    async def come_back(self, on_progress: Callable[[Progress], None]) -> SegmentResult:
        """Follow the gang until all its members are back or lost."""

        def heard(progress: Progress) -> None:
            self._patience.heard(time.monotonic())
            self._stepped = True
            on_progress(progress)

        following = asyncio.ensure_future(self._follow(heard))
        try:
            result = await self._all_back()
        finally:
            following.cancel()
            await asyncio.wait([following])
        if not following.cancelled():
            following.result()
        return result

    async def _all_back(self) -> SegmentResult:
        pending, may_leave_s = set(self._running), 0.0
        while pending:
            done, pending = await asyncio.wait(
                pending,
                timeout=may_leave_s if self._trouble else self._patience.left_s(time.monotonic()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if done:
                if not self._trouble:  # since the last step they may have waited for whoever hangs
                    may_leave_s = self._may_leave_s()
                self._patience.heard(time.monotonic())
                for future in done:
                    self._take(future)
                continue
            if self._trouble:
                cause = f"did not leave its broken gang within {may_leave_s:g} s"
            elif self._patience.left_s(time.monotonic()) == 0.0:
                cause = f"neither made a step nor came back for {self._patience.bound_s:g} s (`stall_s`)"
                self._failures.append(cause)
            else:
                continue
            for future in pending:
                self._give_up(self._running[future], cause)
            break  # whatever they say yet, and however long they take to die
        in_order = {worker: self._ranks[worker] for worker in self.workers if worker in self._ranks}
        return SegmentResult(in_order, tuple(self._lost), tuple(self._failures), self._mute, self._unsent)

    def _take(self, future: asyncio.Future[RankResult]) -> None:
        """Note what came of a member: its result, or why it is given up."""
        worker = self._running[future]
        trouble = True
        try:
            rank = future.result()
        except WorkerDied as error:
            self._give_up(worker, f"died: {error}")
        except StateLost as error:  # it has not begun, as if it were not there
            self._mute, self._unsent = self._sender, str(error)
        except Exception as error:
            self._give_up(worker, f"failed: {error!r}")
            self._failures.append(repr(error))
        else:
            if rank.end is SegmentEnd.FAILED:
                self._give_up(worker, rank.cause)
                self._failures.append(rank.cause)
            else:
                self._ranks[worker] = rank
                trouble = rank.broken
        self._trouble |= trouble

    def _give_up(self, worker: WorkerId, cause: str) -> None:
        self._group.replace(worker, cause)
        self._lost.append(worker)

    def _may_leave_s(self) -> float:
        """Seconds that a rank may take to leave once others left: it hears of it when it next exchanges.

        It may compute for as long as anything takes before, and before the first step nobody knows how long
        that is: one rank may be loading an adapter that the others, who gave it up, had.
        """
        grace_s = self._grace_s + self._patience.longest_s
        return grace_s if self._stepped else max(grace_s, self._patience.bound_s)

    async def _follow(self, on_progress: Callable[[Progress], None]) -> None:
        seen = self._job.step
        while True:
            try:
                progress = await self._first.watch(self._job.serial, seen)
            except WorkerDied:
                return
            if progress.ended:
                return
            seen = progress.step
            on_progress(progress)
            await asyncio.sleep(WATCH_S)
