"""One segment on the host's side: send a gang off, follow it, and say how it came back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError

from ..errors import InvalidRequest, UnsupportedModel
from .config import HostConfig
from .crew import Crew, result_of
from .job import Job
from .messages import Ending, Order, Outcome, Progress

WATCH_S = 0.05
"""At most so often is rank 0 of a gang asked how far it is."""

GRACE_S = 5.0
"""How much longer than a gang's timeout a rank may take to leave once the others left."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a segment ended: the survivors' outcomes by worker, who died, and what was raised."""

    outcomes: dict[int, Outcome]
    lost: tuple[int, ...]
    error: BaseException | None

    @property
    def step(self) -> int:
        """The last step that a survivor finished."""
        return max((outcome.step for outcome in self.outcomes.values()), default=0)

    @property
    def finished(self) -> Outcome | None:
        """The outcome that carries the images."""
        return next((o for o in self.outcomes.values() if o.images is not None), None)

    @property
    def broken(self) -> bool:
        """Whether the gang's communicator is unusable."""
        if self.error is not None:
            return not isinstance(self.error, InvalidRequest | UnsupportedModel)
        endings = {outcome.ending for outcome in self.outcomes.values()}
        return bool(self.lost) or not endings or Ending.BROKEN in endings


async def run_segment(
    crew: Crew, config: HostConfig, job: Job, on_progress: Callable[[Job, Progress], None]
) -> Verdict:
    """Send `job` off to the gang that it holds; its state goes to the members that lack it."""
    workers, request = job.workers, job.request
    assert workers is not None
    try:
        handles = {worker: crew.handles[worker] for worker in workers}
        link = crew.links[workers]
    except KeyError:  # one died between the decision and now
        return Verdict({}, tuple(w for w in workers if w not in crew.handles), None)
    blob = None
    if job.holders and not job.holders.issuperset(workers):
        blob = crew.handles[min(job.holders)].export.remote(request.id)
    running: dict[asyncio.Future[Outcome], int] = {}
    for rank, worker in enumerate(workers):
        order = Order(
            serial=job.serial,
            request=request,
            step=job.step,
            link=link,
            rank=rank,
            parallel=request.parallel or config.parallel,
            preview_steps=request.preview_steps() if rank == 0 else frozenset(),
        )
        lacks = blob is not None and worker not in job.holders
        running[result_of(handles[worker].run.remote(order, blob if lacks else None))] = worker
    following = asyncio.ensure_future(_follow(handles[workers[0]], job, on_progress))
    try:
        return await _come_back(crew, running, config.timeout_s + GRACE_S)
    finally:
        following.cancel()


async def _come_back(crew: Crew, running: dict[asyncio.Future[Outcome], int], grace_s: float) -> Verdict:
    outcomes: dict[int, Outcome] = {}
    lost: list[int] = []
    error: BaseException | None = None
    pending, trouble = set(running), False
    while pending:
        done, pending = await asyncio.wait(
            pending, timeout=grace_s if trouble else None, return_when=asyncio.FIRST_COMPLETED
        )
        for future in done:
            worker, raised = running[future], future.exception()
            if raised is None:
                outcomes[worker] = future.result()
                trouble |= outcomes[worker].ending is Ending.BROKEN
                continue
            trouble = True
            if isinstance(raised, RayActorError):
                crew.lose(worker, "died")
                lost.append(worker)
            elif isinstance(raised, RayTaskError):
                if not isinstance(raised.cause, RayError):  # else the state's sender died: as if it were here
                    error = raised.cause
            else:
                error = raised
        if not done:
            for future in pending:
                crew.lose(running[future], f"did not leave its broken gang within {grace_s:g} s")
    by_rank = {worker: outcomes[worker] for worker in running.values() if worker in outcomes}
    return Verdict(by_rank, tuple(lost), error)


async def _follow(handle: Any, job: Job, on_progress: Callable[[Job, Progress], None]) -> None:
    seen = job.step
    while True:
        try:
            progress: Progress = await handle.watch.remote(job.serial, seen)
        except RayError:
            return
        if progress.ended:
            return
        seen = progress.step
        on_progress(job, progress)
        await asyncio.sleep(WATCH_S)
