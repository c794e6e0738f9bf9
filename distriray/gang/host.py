"""A host: it keeps a queue, asks a policy which request runs on which workers, and sees it done."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from PIL import Image

from ..errors import GangBroken, GenerationCancelled, InvalidRequest, QueueFull
from ..requests import MULTIPLE_OF, GenerationRequest, GenerationResult
from ..routing.buddy import BuddyAllocator
from ..routing.latency import LatencyModel
from ..routing.policy import EarliestDeadlineFirst, HostPolicy, HostView, moves
from .config import HostConfig
from .crew import Crew
from .events import Event, Finished, Preview, Queued, Regrouped, Repaired, Started, Step
from .job import Job, typical_step_s
from .messages import Progress, Wish, WorkerFacts
from .placement import Placement
from .profile import starting_profile
from .segments import Verdict, run_segment
from .status import HostStatus, RepairStatus, RequestStatus, WorkerStatus

Workers = tuple[int, ...]


class Host:
    """Workers on one node, lent out in gangs. Inside a Serve replica as in a script.

    Everything belongs to the event loop that `start` ran in. Use `Host.start`, not the constructor.
    """

    def __init__(self, config: HostConfig, placement: Placement, policy: HostPolicy | None = None) -> None:
        self.config = config
        self.policy: HostPolicy = policy or EarliestDeadlineFirst()
        self._placement = placement
        self._crew = Crew(config, placement, self._worker_lost, self._worker_ready)
        self._blocks = BuddyAllocator((), config.sizes)
        self._jobs: dict[str, Job] = {}
        self._serials = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._review: asyncio.TimerHandle | None = None
        self._waking = False
        self._late: set[int] = set()
        self._loop = asyncio.get_running_loop()
        self._facts: WorkerFacts
        self.latency: LatencyModel
        self._closed = False

    @classmethod
    async def start(cls, config: HostConfig, policy: HostPolicy | None = None) -> Host:
        """Reserve the bundles, start and load the workers, form every gang once.

        Raises:
            NotEnoughDevices: the cluster is too small.
            ModelNotFound, UnsupportedModel: the model cannot be loaded or cannot be cut into patches.
        """
        host = cls(config, await Placement.make(config), policy)
        try:
            await host._crew.start()
        except BaseException:
            await host.close()
            raise
        host._facts = host._crew.facts[0]
        host.latency = LatencyModel(starting_profile(config, host._facts))
        for index in range(config.workers):
            host._blocks.restore(index)
        return host

    # What a request's owner calls

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        """Make the images of `request`. Cancelling this coroutine cancels the request.

        Raises:
            InvalidRequest, QueueFull: at once.
            GenerationCancelled: somebody called `cancel`, or the host is closed.
            GangBroken: its gang broke more often than the configuration allows.
        """
        job = self._accept(request)
        try:
            return await asyncio.shield(job.ended)
        except asyncio.CancelledError:
            self._cancel(job)
            raise

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """What happens to `request`, ending with `Finished`. Closing the generator cancels the request.

        Raises as `generate` does.
        """
        job = self._accept(request)
        events = job.events
        try:
            while not (job.ended.done() and events.empty()):
                news = asyncio.ensure_future(events.get())
                watched: list[asyncio.Future[Any]] = [news, job.ended]
                await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
                if news.done():
                    yield news.result()
                else:
                    news.cancel()
            yield Finished(job.request.id, job.ended.result())
        finally:
            self._cancel(job)

    async def cancel(self, request_id: str) -> bool:
        """Stop a request after the step it is in; whether there was one."""
        job = self._jobs.get(request_id)
        if job is None:
            return False
        self._cancel(job)
        return True

    def status(self) -> HostStatus:
        """Queue, gangs, workers, repairs, and how long what was accepted will take."""
        crew, now = self._crew, time.monotonic()
        working = {w: job.request.id for job in self._jobs.values() for w in job.workers or ()}
        requests = {
            job: RequestStatus(
                id=job.request.id,
                step=job.step,
                num_steps=job.request.num_inference_steps,
                waited_s=now - job.arrival,
                workers=job.workers,
            )
            for job in self._jobs.values()
        }
        return HostStatus(
            model=self.config.model.name,
            device=self._placement.device,
            healthy=crew.failure is None and not self._closed,
            gang_sizes=self.config.sizes,
            default_size=self._facts.default_size,
            workers=[
                WorkerStatus(
                    index=index,
                    healthy=index in crew.healthy,
                    pid=facts.pid,
                    device=facts.device,
                    load_s=facts.load_s,
                    memory=crew.memory[index],
                    request=working.get(index),
                )
                for index, facts in sorted(crew.facts.items())
            ],
            free_workers=len(self._blocks.free),
            running=[status for job, status in requests.items() if job.workers],
            waiting=[status for job, status in requests.items() if not job.workers],
            max_queue=self.config.max_queue,
            work_s=self.work_s(),
            repairs=[RepairStatus(worker=r.worker, cause=r.cause, seconds=r.seconds) for r in crew.repairs],
        )

    def view(self) -> HostView:
        """What a policy, or a router, may know now."""
        breaking = {w for job in self._jobs.values() if job.breaking for w in job.workers or ()}
        return HostView(
            now_s=time.monotonic(),
            workers=tuple(sorted(self._crew.healthy - breaking)),
            gang_sizes=self.config.sizes,
            requests=tuple(job.view() for job in self._jobs.values() if not job.breaking),
        )

    def work_s(self) -> float:
        """Predicted seconds until everything accepted is finished, were it spread evenly."""
        return sum(self._worker_seconds(job) for job in self._jobs.values()) / self.config.workers

    async def check_health(self) -> None:
        """Return if the host can serve; raise GangBroken if a worker is beyond repair."""
        if self._crew.failure is not None:
            raise GangBroken(self._crew.failure)

    async def close(self) -> None:
        """Cancel what is unfinished, end the workers, give the bundles back. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._review is not None:
            self._review.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for job in list(self._jobs.values()):
            self._end(job, GenerationCancelled(f"request {job.request.id}: the host was closed"))
        await self._crew.close()
        self._placement.release()

    # Accepting

    def _accept(self, request: GenerationRequest) -> Job:
        if self._closed:
            raise GenerationCancelled("the host is closed")
        request = request.settled(*self._facts.default_size)
        self.config.limits.check(request)
        if request.id in self._jobs:
            raise InvalidRequest(f"request {request.id!r} is already being worked on", "id")
        assert request.height is not None
        rows = request.height // MULTIPLE_OF
        max_gang = max(1, -(-rows // 2**self._facts.levels))
        if request.gang_size != "auto":
            if request.gang_size not in self.config.sizes:
                raise InvalidRequest(
                    f"gang_size {request.gang_size} is not lent here; use one of {list(self.config.sizes)}",
                    "gang_size",
                )
            if request.gang_size > max_gang:
                raise InvalidRequest(
                    f"height {request.height} is too small for a gang of {request.gang_size}; "
                    f"use at most {max_gang}",
                    "gang_size",
                )
        waiting = [job for job in self._jobs.values() if job.workers is None]
        if len(waiting) >= self.config.max_queue:
            raise QueueFull(
                f"{len(waiting)} requests wait, which is the limit; try again in {self.work_s():.1f} s",
                max(0.1, self.work_s()),
            )
        job = Job(request, max_gang)
        job.tell(Queued(request.id, len(waiting), self.work_s() if waiting else 0.0))
        self._jobs[request.id] = job
        self._wake()
        return job

    def _cancel(self, job: Job) -> None:
        if job.ended.done() or job.cancelled:
            return
        job.cancelled = True
        if job.workers is None:
            self._end(job, GenerationCancelled(f"request {job.request.id} was cancelled at step {job.step}"))
        else:
            self._ask(job, Wish.CANCEL)

    # Deciding

    def _wake(self) -> None:
        """Decide as soon as what happens now is over; call when anything that a policy sees has changed."""
        if not self._waking and not self._closed:
            self._waking = True
            self._loop.call_soon(self._decide)

    def _decide(self) -> None:
        self._waking = False
        if self._review is not None:
            self._review.cancel()
            self._review = None
        if self._closed or not self._jobs:
            return
        view = self.view()
        todo = moves(view, self.policy.plan(view, self.latency))
        for name in todo.yields:
            job = self._jobs[name]
            if not job.yielding and not job.cancelled:
                job.yielding = True
                self._ask(job, Wish.YIELD)
        for name, workers in todo.starts.items():
            self._blocks.take(workers)
            job = self._jobs[name]
            job.begin(workers, next(self._serials))
            self._spawn(self._work(job))
        if self.policy.review_s is not None:
            self._review = self._loop.call_later(self.policy.review_s, self._decide)

    def _worker_lost(self, index: int) -> None:
        self._blocks.remove(index)
        for job in self._jobs.values():
            job.holders.discard(index)
            job.breaking |= index in (job.workers or ())
        self._wake()

    def _worker_ready(self, index: int) -> None:
        if any(index in (job.workers or ()) for job in self._jobs.values()):
            self._late.add(index)  # its gang is still being cleared up
        else:
            self._blocks.restore(index)
            self._wake()

    def _ask(self, job: Job, wish: Wish) -> None:
        for index in job.workers or ():
            if index in self._crew.handles:
                self._crew.handles[index].ask.remote(job.serial, wish)

    # Working

    async def _work(self, job: Job) -> None:
        """One gang works on one request until it is done, yields, is cancelled or breaks."""
        workers, request, began = job.workers, job.request, time.monotonic()
        assert workers is not None
        if not job.holders:
            job.step, job.prepared = 0, False
        first = job.step
        if job.segments:
            job.tell(Regrouped(request.id, workers, first))
        else:
            job.tell(Started(request.id, workers))
        verdict = await run_segment(self._crew, self.config, job, self._heard)
        if verdict.outcomes:
            job.account(verdict.outcomes.values(), first, time.monotonic() - began)
            for step, image in next(iter(verdict.outcomes.values())).previews:
                self._show(job, step, image)
        job.step, job.prepared = verdict.step, bool(verdict.outcomes)
        alive = self._crew.handles.keys()
        job.holders = {w for w, o in verdict.outcomes.items() if o.step == job.step and w in alive}
        job.workers, job.breaking = None, False
        self._blocks.release(workers)
        for index in self._late.intersection(workers):
            self._late.discard(index)
            self._blocks.restore(index)
        if verdict.broken and len(workers) > 1 and alive >= set(workers) and not verdict.lost:
            self._crew.relink(workers)
        self._conclude(job, workers, verdict)
        self._wake()

    def _conclude(self, job: Job, workers: Workers, verdict: Verdict) -> None:
        request = job.request
        for outcome in verdict.outcomes.values():
            if (step_s := typical_step_s(outcome)) is not None:
                shape = (job.view().height, job.view().width, request.num_images)
                self.latency.observe(len(workers), *shape, step_s)
                break
        if verdict.finished is not None:
            self._end(job, job.result(self.config.model.name, verdict.finished))
        elif verdict.error is not None:
            self._end(job, verdict.error)
        elif job.cancelled:
            self._end(job, GenerationCancelled(f"request {request.id} was cancelled at step {job.step}"))
        elif verdict.broken:
            job.breaks += 1
            if job.breaks >= self.config.max_attempts:
                causes = {o.cause for o in verdict.outcomes.values() if o.cause} or {f"lost {verdict.lost}"}
                message = f"request {request.id}: {job.breaks} gangs broke under it: {'; '.join(causes)}"
                self._end(job, GangBroken(message))
            else:
                job.tell(Repaired(request.id, verdict.lost, job.step))

    def _end(self, job: Job, end: GenerationResult | BaseException) -> None:
        """The one place where a request ends."""
        del self._jobs[job.request.id]
        if isinstance(end, GenerationResult):
            job.ended.set_result(end)
        else:
            job.ended.set_exception(end)
        for index in job.ever_held:
            if index in self._crew.handles:
                self._crew.handles[index].forget.remote([job.request.id])

    def _heard(self, job: Job, progress: Progress) -> None:
        request = job.request
        job.step = progress.step
        job.prepared |= progress.step > 0
        for step, image in progress.previews:
            self._show(job, step, image)
        seconds = time.monotonic() - job.arrival
        size = len(job.workers or ())
        job.tell(Step(request.id, progress.step, request.num_inference_steps, size, seconds))

    def _show(self, job: Job, step: int, image: Image.Image) -> None:
        if step > job.shown:
            job.tell(Preview(job.request.id, step, job.previews, image))
            job.shown, job.previews = step, job.previews + 1

    def _worker_seconds(self, job: Job) -> float:
        view = job.view()
        return min(
            size
            * self.latency.run_s(size, view.height, view.width, view.batch, view.steps_done, view.steps_total)
            for size in self.config.sizes
            if view.allows(size)
        )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
