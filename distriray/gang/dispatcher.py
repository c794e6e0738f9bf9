"""What a host does all day: accept requests, ask its policy who runs where, see each to its one end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import replace

from PIL import Image

from ..errors import GangBroken, GenerationCancelled, InvalidRequest, ModelNotFound, QueueFull
from ..requests import GenerationRequest, GenerationResult
from ..routing.buddy import WorkersUnavailable
from ..routing.policy import HostPolicy, HostView, moves
from ..routing.router import backlog_s, predicted_s
from .admission import admit
from .background import Background
from .config import HostConfig
from .crew import Crew
from .events import Preview, Queued, Regrouped, Repaired, Started, Step
from .job import Job
from .messages import Ending, Progress, Wish, WorkerFacts
from .metrics import HostMetrics
from .profile import guessed_profile
from .remote import RemoteWorker, WorkerId
from .segments import Verdict, run_segment
from .speed import Speed

log = logging.getLogger("ray.serve.distriray")


class Dispatcher:
    """The unfinished requests of one host and its workers. All methods belong to one event loop.

    Args:
        launch: starts a process in the place of a worker.
        name: of the host, in its metrics.

    Attributes:
        jobs: unfinished requests by id, in order of arrival.
        leased: workers whose gang is out; taken before it is sent off and given back after.
        speed: what the policy believes of the workers' speed; every segment corrects it.
        metrics: what an operator is told.
        fault: the policy's or the host's own error, after which nothing is right any more.
    """

    facts: WorkerFacts
    speed: Speed

    def __init__(
        self, config: HostConfig, launch: Callable[[int], RemoteWorker], policy: HostPolicy, name: str = ""
    ) -> None:
        self.config, self.policy = config, policy
        self.crew = Crew(config, launch, self)
        self.leased: set[int] = set()
        self.jobs: dict[str, Job] = {}
        self.metrics = HostMetrics(config.model.name, name)
        self.fault: BaseException | None = None
        self._accepted = self._segments = 0
        self._background = Background(self._fail)
        self._review: asyncio.TimerHandle | None = None
        self._waking = False
        self._closed = False

    async def start(self) -> None:
        """Bring the workers up; raises as `Crew.start`."""
        await self.crew.start()
        self.facts = self.crew.facts[0]
        self.speed = Speed(guessed_profile(self.config, self.facts))

    async def close(self) -> None:
        """Cancel what is unfinished and end the workers. Idempotent."""
        self._closed = True
        if self._review is not None:
            self._review.cancel()
        await self._background.close()
        for job in list(self.jobs.values()):
            self._end(job, GenerationCancelled(f"request {job.request.id}: the host was closed"))
        await self.crew.close()

    @property
    def healthy(self) -> bool:
        """Whether the host can serve."""
        return self.fault is None and self.crew.failure is None and not self._closed

    @property
    def free(self) -> set[int]:
        """Workers that can be lent now."""
        return self.crew.healthy - self.leased

    def view(self) -> HostView:
        """What a policy, or a router, may know now."""
        breaking = {w for job in self.jobs.values() if job.breaking for w in job.workers or ()}
        return HostView(
            now_s=time.monotonic(),
            workers=tuple(sorted(self.crew.healthy - breaking)),
            gang_sizes=self.config.sizes,
            requests=tuple(job.view() for job in self.jobs.values() if not job.breaking),
        )

    def work_s(self) -> float:
        """Predicted seconds until everything accepted is finished, were it spread evenly over all workers."""
        everyone = tuple(range(self.config.workers))
        return backlog_s(replace(self.view(), workers=everyone), self.speed.model)

    # Accepting

    def accept(self, request: GenerationRequest) -> Job:
        """Check a request and queue it.

        Raises:
            InvalidRequest, ModelNotFound, QueueFull; GenerationCancelled once the host is closed.
        """
        if self._closed:
            raise GenerationCancelled("the host is closed")
        if request.model not in (None, self.config.model.name):
            raise ModelNotFound(f"no model {request.model!r} here; this host has {self.config.model.name!r}")
        request, max_gang = admit(request, self.config, self.facts)
        if request.id in self.jobs:
            raise InvalidRequest(f"request {request.id!r} is already being worked on", "id")
        waiting = [job for job in self.jobs.values() if job.workers is None]
        if len(waiting) >= self.config.max_queue:
            self.metrics.refused()
            raise QueueFull(
                f"{len(waiting)} requests wait, which is the limit; try again in {self.work_s():.1f} s",
                max(0.1, self.work_s()),
            )
        self._accepted += 1
        job = Job(request, max_gang, self._accepted)
        job.predicted_s = predicted_s(self.view(), job.view(), self.speed.model)
        job.tell(Queued(request.id, len(waiting), self.work_s() if waiting else 0.0))
        self.jobs[request.id] = job
        self._wake()
        return job

    def cancel(self, job: Job) -> None:
        """Stop a request after the step it is in; nothing happens if it is over."""
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
            self._background.soon(self._decide)

    def _decide(self) -> None:
        self._waking = False
        if self._review is not None:
            self._review.cancel()
            self._review = None
        if self._closed:
            return
        self._tell_levels()
        view = self.view()
        if not view.requests:
            return
        try:
            todo = moves(view, self.policy.plan(view, self.speed.model))
        except Exception as error:
            self._fail(error)
            return
        for name in todo.yields:
            job = self.jobs[name]
            if not job.yielding and not job.cancelled:
                job.yielding = True
                self._ask(job, Wish.YIELD)
        for name, workers in todo.starts.items():
            if missing := set(workers) - self.free:
                self._fail(WorkersUnavailable(f"workers {sorted(missing)} are leased or dead"))
                return
            self.leased.update(workers)
            self._segments += 1
            job = self.jobs[name]
            job.begin(workers, self._segments)
            self._background.spawn(self._work(job, workers))
        if todo.starts:
            self._tell_levels()
        if self.policy.review_s is not None:
            self._review = self._background.later(self.policy.review_s, self._decide)

    def _tell_levels(self) -> None:
        """After any change of who runs: to the operator, and to what learns from it."""
        running = [job for job in self.jobs.values() if job.workers]
        self.speed.busy(sum(1 if job.decoding else len(job.workers or ()) for job in running))
        self.metrics.level(
            waiting=len(self.jobs) - len(running),
            running=len(running),
            free=len(self.free),
            busy=sum(len(job.workers or ()) for job in running),
            down=self.config.workers - len(self.crew.healthy),
            repairs=len(self.crew.repairs),
            backlog_s=self.work_s(),
        )

    def worker_out(self, index: int) -> None:
        """For `Crew`."""
        for job in self.jobs.values():
            job.breaking |= index in (job.workers or ())
        self._wake()

    def worker_dead(self, worker: WorkerId) -> None:
        """For `Crew`."""
        for job in self.jobs.values():
            job.held.pop(worker, None)
            if job.workers is None:
                job.rewind()

    def worker_ready(self, index: int) -> None:
        """For `Crew`."""
        self._wake()

    def unfinished(self) -> tuple[Collection[int], int]:
        """For `Crew`."""
        return {job.number for job in self.jobs.values()}, self._accepted

    def _ask(self, job: Job, wish: Wish) -> None:
        for index in job.workers or ():
            if (member := self.crew.member(index)) is not None:
                member.remote.ask(job.serial, wish)

    # Working

    async def _work(self, job: Job, workers: tuple[int, ...]) -> None:
        """One gang works on one request until it is done, yields, is cancelled or breaks.

        An error of the host's own ends this request; its gang, which may be anywhere, is made anew.
        """
        gang = [member.id for index in workers if (member := self.crew.member(index)) is not None]
        try:
            verdict = await self._segment(job)
            job.workers, job.breaking = None, False
            self._conclude(job, verdict)
            if verdict.torn and len(gang) > 1 and all(map(self.crew.alive, gang)):
                self.crew.relink(gang)
        except Exception as error:
            log.exception("a segment of request %s failed", job.request.id)
            for worker in gang:
                self.crew.lose(worker, f"the host failed in its segment: {error!r}")
            self._end(job, error)
        finally:
            self.leased.difference_update(workers)
            self._wake()

    async def _segment(self, job: Job) -> Verdict:
        """Send the gang off, and take over what it brings back."""
        workers, request, began = job.workers, job.request, self.speed.now()
        assert workers is not None
        job.rewind()
        first = job.step
        if job.segments:
            job.tell(Regrouped(request.id, workers, first))
        else:
            job.tell(Started(request.id, workers))
        verdict = await run_segment(self.crew, self.config, job, self._heard)
        if worked := verdict.worked:
            job.account(worked, first, time.monotonic() - began.clock_s)
            self.metrics.segment(job, worked)
            self.speed.learn(job, began)
            for step, image in worked[0].previews:
                self._show(job, step, image)
        for worker, outcome in verdict.outcomes.items():
            if outcome.ending in (Ending.DONE, Ending.YIELDED, Ending.CANCELLED):
                self.crew.proved(worker)
        job.held.update({worker: step for worker, step in verdict.held.items() if self.crew.alive(worker)})
        job.rewind()
        return verdict

    def _conclude(self, job: Job, verdict: Verdict) -> None:
        request = job.request
        if verdict.finished is not None:
            self._end(job, job.result(self.config.model.name, verdict.finished))
        elif verdict.error is not None:
            self._end(job, verdict.error)
        elif job.cancelled:
            self._end(job, GenerationCancelled(f"request {request.id} was cancelled at step {job.step}"))
        elif verdict.interrupted:
            job.breaks += 1
            job.failures += verdict.failures
            self.metrics.gang_broke()
            alike = len(set(job.failures)) < len(job.failures)  # two workers failed in one way
            if alike or job.breaks >= self.config.max_attempts:
                causes = "; ".join(verdict.causes)
                message = f"request {request.id}: {job.breaks} gangs broke under it: {causes}"
                self._end(job, GangBroken(message))
            else:
                job.tell(Repaired(request.id, tuple(worker.index for worker in verdict.lost), job.step))

    def _end(self, job: Job, end: GenerationResult | BaseException) -> None:
        """The one place where a request ends."""
        if self.jobs.pop(job.request.id, None) is None:
            return
        self.metrics.ended(job, end)
        self._wake()
        if isinstance(end, GenerationResult):
            job.ended.set_result(end)
        else:
            job.ended.set_exception(end)
        for worker in job.held:
            if (remote := self.crew.remote(worker)) is not None:
                remote.retain(*self.unfinished())

    def _heard(self, job: Job, progress: Progress) -> None:
        request = job.request
        job.step, job.num_steps = progress.step, progress.num_steps
        job.prepared |= progress.step > 0
        if job.decoding:
            self._tell_levels()
        for step, image in progress.previews:
            self._show(job, step, image)
        seconds = time.monotonic() - job.arrival
        size = len(job.workers or ())
        job.tell(Step(request.id, job.step, job.num_steps, size, seconds))

    def _show(self, job: Job, step: int, image: Image.Image) -> None:
        if step > job.shown:
            job.tell(Preview(job.request.id, step, job.previews, image))
            job.shown, job.previews = step, job.previews + 1

    def _fail(self, error: BaseException) -> None:
        """The policy or the host itself has a bug: nobody waits for ever, and no health check passes."""
        self.fault = error
        for job in list(self.jobs.values()):
            self._end(job, error)
