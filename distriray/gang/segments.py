"""One segment on the host's side: send a gang off, follow it, and say how it came back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import DistrirayError
from .config import HostConfig
from .crew import Crew
from .job import Job
from .messages import Ending, Order, Outcome, Progress
from .remote import RemoteWorker, StateLost, WorkerDied, WorkerId

WATCH_S = 0.05
"""At most so often is rank 0 of a gang asked how far it is."""

GRACE_S = 5.0
"""How much longer than a gang's timeout a rank may take to leave once the others left."""

WORKED = (Ending.DONE, Ending.YIELDED, Ending.CANCELLED, Ending.BROKEN)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a segment ended.

    Attributes:
        outcomes: of the processes that can be relied on, lowest rank first.
        lost: those that died, hung or failed.
        failures: what the failed ones said.
    """

    outcomes: dict[WorkerId, Outcome]
    lost: tuple[WorkerId, ...] = ()
    failures: tuple[str, ...] = ()

    @property
    def held(self) -> dict[WorkerId, int]:
        """The step that each process holds the request's state at."""
        return {worker: o.step for worker, o in self.outcomes.items() if o.ending is not Ending.REFUSED}

    @property
    def worked(self) -> list[Outcome]:
        """The outcomes of those that took part in the steps."""
        return [outcome for outcome in self.outcomes.values() if outcome.ending in WORKED]

    @property
    def finished(self) -> Outcome | None:
        """The outcome that carries the images."""
        return next((o for o in self.outcomes.values() if o.images is not None), None)

    @property
    def error(self) -> DistrirayError | None:
        """Why the request was refused."""
        return next((o.error for o in self.outcomes.values() if o.error is not None), None)

    @property
    def interrupted(self) -> bool:
        """Whether the gang ended before its time."""
        endings = {outcome.ending for outcome in self.outcomes.values()}
        return bool(self.lost) or not endings or not endings.isdisjoint((Ending.BROKEN, Ending.NOT_BEGUN))

    @property
    def torn(self) -> bool:
        """Whether the gang's communicator is unusable."""
        return any(outcome.broken for outcome in self.outcomes.values())

    @property
    def causes(self) -> list[str]:
        """Why the gang ended before its time, for its owner."""
        told = {outcome.cause for outcome in self.outcomes.values() if outcome.cause} | set(self.failures)
        return sorted(told) or [f"lost workers {[worker.index for worker in self.lost]}"]


async def run_segment(
    crew: Crew, config: HostConfig, job: Job, on_progress: Callable[[Job, Progress], None]
) -> Verdict:
    """Send `job` off to the gang that it holds; its state goes to the members that lack it."""
    places, request = job.workers, job.request
    assert places is not None
    gang = [member for index in places if (member := crew.member(index)) is not None]
    link = crew.links.get(places)
    if link is None or len(gang) < len(places):  # one died between the decision and now
        return Verdict({})
    state, holders = None, job.holders
    if holders and not holders.issuperset(member.id for member in gang):
        sender = crew.remote(min(holders))
        assert sender is not None, "a job loses its holders when they die"
        state = sender.export(job.number)
    running: dict[asyncio.Future[Outcome], WorkerId] = {}
    for rank, member in enumerate(gang):
        order = Order(
            serial=job.serial,
            job=job.number,
            request=request,
            step=job.step,
            link=link,
            rank=rank,
            parallel=request.parallel or config.parallel,
            preview_steps=request.preview_steps() if rank == 0 else frozenset(),
        )
        lacks = state is not None and member.id not in holders
        running[member.remote.run(order, state if lacks else None)] = member.id
    following = asyncio.ensure_future(_follow(gang[0].remote, job, on_progress))
    try:
        verdict = await _come_back(crew, running, config.timeout_s + GRACE_S)
    finally:
        following.cancel()
        await asyncio.wait([following])
    if not following.cancelled():
        following.result()
    return verdict


async def _come_back(crew: Crew, running: dict[asyncio.Future[Outcome], WorkerId], grace_s: float) -> Verdict:
    outcomes: dict[WorkerId, Outcome] = {}
    lost: list[WorkerId] = []
    failures: list[str] = []
    pending, trouble = set(running), False

    def give_up(worker: WorkerId, cause: str) -> None:
        crew.lose(worker, cause)
        lost.append(worker)

    while pending:
        done, pending = await asyncio.wait(
            pending, timeout=grace_s if trouble else None, return_when=asyncio.FIRST_COMPLETED
        )
        for future in done:
            worker = running[future]
            try:
                outcome = future.result()
            except WorkerDied:
                give_up(worker, "died")
            except StateLost:
                pass  # it has not begun, as if it were not there
            except Exception as error:
                give_up(worker, f"failed: {error!r}")
                failures.append(repr(error))
            else:
                if outcome.ending is Ending.FAILED:
                    give_up(worker, outcome.cause)
                    failures.append(outcome.cause)
                else:
                    outcomes[worker] = outcome
                    trouble |= outcome.broken
                    continue
            trouble = True
        if not done:
            for future in pending:
                crew.lose(running[future], f"did not leave its broken gang within {grace_s:g} s")
    by_rank = {worker: outcomes[worker] for worker in running.values() if worker in outcomes}
    return Verdict(by_rank, tuple(lost), tuple(failures))


async def _follow(worker: RemoteWorker, job: Job, on_progress: Callable[[Job, Progress], None]) -> None:
    seen = job.step
    while True:
        try:
            progress = await worker.watch(job.serial, seen)
        except WorkerDied:
            return
        if progress.ended:
            return
        seen = progress.step
        on_progress(job, progress)
        await asyncio.sleep(WATCH_S)
