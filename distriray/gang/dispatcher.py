"""Dispatcher of a host: accepts requests, asks the policy who runs where, ends each exactly once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import chain

from distriray.adapters import AdapterSpec, Catalogue
from distriray.errors import (
    GangBroken,
    GenerationCancelled,
    InvalidRequest,
    ModelNotFound,
    NotEnoughDevices,
    QueueFull,
    UnsupportedModel,
)
from distriray.events import Queued, Repaired
from distriray.gang.admission import Admitted, admit, check_listed, check_parallel, example, settle
from distriray.gang.background import Background
from distriray.gang.config import HostConfig
from distriray.gang.job import Job, JobState
from distriray.gang.messages import Progress, StopSignal, WorkerFacts, WorkerId
from distriray.gang.metrics import HostMetrics
from distriray.gang.profile import guessed_profile
from distriray.gang.record import Record
from distriray.gang.remote import RemoteWorker
from distriray.gang.segment_result import IN_ORDER, SegmentResult
from distriray.gang.segments import RunningSegment
from distriray.gang.speed import Moment, Speed
from distriray.gang.worker_group import WorkerGroup
from distriray.requests import GenerationRequest
from distriray.results import GenerationResult
from distriray.routing.buddy import WorkersUnavailable
from distriray.routing.host_clock import busy_workers
from distriray.routing.policy import HostPolicy, HostView, moves
from distriray.routing.router import backlog_s, predicted_s

log = logging.getLogger("ray.serve.distriray")

REPORTED_ADAPTERS = 16
"""Adapters of each worker that routers are told of, those that it used last."""


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
        catalogue: the adapters that requests may name.
        record: what happened lately, for whoever watches.
        fault: the policy's or the host's own error, after which nothing is right any more.
    """

    facts: WorkerFacts
    speed: Speed

    def __init__(
        self, config: HostConfig, launch: Callable[[int], RemoteWorker], policy: HostPolicy, name: str = ""
    ) -> None:
        self.config, self.policy = config, policy
        self.group = WorkerGroup(config, launch, self)
        self.leased: set[int] = set()
        self.jobs: dict[str, Job] = {}
        self.metrics = HostMetrics(config.model.name, name)
        self.catalogue = Catalogue(config.model.name, config.loras, config.lora_dir)
        self.record = Record()
        self.fault: BaseException | None = None
        self._accepted = self._segments = 0
        self._background = Background(self._fail)
        self._review: asyncio.TimerHandle | None = None
        self._serving = self._waking = self._resting = False
        self._all_back = asyncio.Event()

    async def start(self) -> None:
        """Bring the workers up; raises as `WorkerGroup.start`.

        Raises:
            UnsupportedModel: the model has nothing for a default of the configuration, or gangs cannot share
                its steps as that says.
        """
        await self.group.start()
        self.facts = self.group.facts[0]
        try:  # nobody is refused for what they did not ask for
            settle(example(self.facts), self.config, self.facts)
        except InvalidRequest as error:
            raise UnsupportedModel(f"defaults of {self.config.model.name}: {error}") from error
        try:
            check_parallel(self.config.parallel, self.config.sizes, self.facts)
        except InvalidRequest as error:
            raise UnsupportedModel(f"parallel: {error}") from error
        try:
            admit(example(self.facts), self.config, self.facts)
        except InvalidRequest as error:
            log.warning("%s: requests that leave it open are refused: %s", self.config.model.name, error)
        self.speed = Speed(guessed_profile(self.config, self.facts))
        self._serving = True
        self._wake()

    async def close(self) -> None:
        """Cancel what is unfinished and end the workers. Idempotent."""
        self._serving = False
        if self._review is not None:
            self._review.cancel()
        await self._background.close()
        for job in list(self.jobs.values()):
            self._end(job, GenerationCancelled(f"request {job.request.id}: the host was closed"))
        await self.group.close()
        self.metrics.closed()

    @property
    def healthy(self) -> bool:
        """Whether the host can serve."""
        return self.fault is None and self.group.failure is None and self._serving

    @property
    def free(self) -> set[int]:
        """Workers that can be lent now."""
        return self.group.healthy - self.leased

    @property
    def waiting(self) -> int:
        """The number of requests that wait for workers."""
        return sum(job.state is JobState.WAITING for job in self.jobs.values())

    def view(self) -> HostView:
        """The view of a policy, or a router, now."""
        breaking = {w for job in self.jobs.values() if job.breaking for w in job.workers or ()}
        return HostView(
            now_s=time.monotonic(),
            workers=tuple(sorted(self.group.healthy - breaking)),
            gang_sizes=self.config.sizes,
            requests=tuple(job.view() for job in self.jobs.values() if not job.breaking),
            regroups=self.policy.regroups,
        )

    def repair_s(self) -> float | None:
        """Predicted seconds until all workers can be lent; None if they can be now, or will never be."""
        if not self.healthy or len(self.view().workers) == self.config.workers:
            return None
        if self.group.repairs:
            return self.group.repairs[-1].seconds
        return max(facts.load_s for facts in self.group.facts.values())

    @property
    def adapters(self) -> frozenset[str]:
        """The names of adapters that a worker holds, of each worker those that it used last."""
        held = (member.adapters.names[-REPORTED_ADAPTERS:] for member in self.group.members)
        return frozenset(chain.from_iterable(held))

    def backlog_s(self) -> float:
        """Predicted seconds until everything accepted is finished, were it spread evenly over all workers."""
        everyone = tuple(range(self.config.workers))
        return backlog_s(replace(self.view(), workers=everyone), self.speed.model)

    # Accepting

    def accept(self, request: GenerationRequest) -> Job:
        """Check a request and queue it.

        Raises:
            InvalidRequest, ModelNotFound, AdapterNotFound, ControlNetNotFound, IPAdapterNotFound, QueueFull;
                NotEnoughDevices once the workers for it are beyond repair, GenerationCancelled once the host
                is closed.
        """
        if not self._serving:
            raise GenerationCancelled("the host is closed")
        if request.model not in (None, self.config.model.name):
            raise ModelNotFound(f"no model {request.model!r} here; this host has {self.config.model.name!r}")
        admitted = admit(request, self.config, self.facts)
        check_listed(admitted.request, self.config)
        adapters = self.catalogue.find(admitted.request.loras)
        if self.waiting >= self.config.max_queue:
            self.metrics.refused()
            raise QueueFull(
                f"{self.waiting} requests wait, which is the limit; try again in {self.backlog_s():.1f} s",
                max(0.1, self.backlog_s()),
            )
        return self._queue(admitted, adapters)

    def accept_own(self, request: GenerationRequest) -> Job:
        """Queue a request of the host's own, which neither limits nor the queue's bound hold for.

        Raises:
            InvalidRequest, NotEnoughDevices: no gang here can serve it, or none any more.
        """
        return self._queue(admit(request, self.config, self.facts, limited=False))

    def _queue(self, admitted: Admitted, adapters: tuple[AdapterSpec, ...] = ()) -> Job:
        request = admitted.request
        if request.id in self.jobs:
            raise InvalidRequest(f"request {request.id!r} is already being worked on", "id")
        self._accepted += 1
        job = Job(admitted, self._accepted, adapters)
        if not self._can_serve(job):
            raise NotEnoughDevices(f"no gang here can serve this any more: {self.group.failure}")
        job.predicted_s = predicted_s(self.view(), job.view(), self.speed.model)
        job.tell(Queued(request.id, self.waiting, self.backlog_s() if self.waiting else 0.0))
        self.jobs[request.id] = job
        self._wake()
        return job

    def cancel(self, job: Job) -> None:
        """Stop a request after the step it is in; nothing happens if it is over."""
        if not job.cancel():
            return
        if job.state is JobState.WAITING:
            self._end(job, GenerationCancelled(f"request {job.request.id} was cancelled at step {job.step}"))
        else:
            self._stop(job, StopSignal.CANCEL)

    # Deciding

    def _wake(self) -> None:
        """Decide as soon as what happens now is over; call when anything that a policy sees has changed.

        Workers may come and go before the host serves, and then there is nothing to decide.
        """
        if self._serving and not self._waking:
            self._waking = True
            self._background.soon(self._decide)

    def _decide(self) -> None:
        """Carry out what the policy plans now; its errors, like all in the background, fail the host."""
        self._waking = False
        if self._review is not None:
            self._review.cancel()
            self._review = None
        if self._resting or not self._serving:
            return
        self._tell_levels()
        view = self.view()
        if not view.requests:
            return
        todo = moves(view, self.policy.plan(view, self.speed.model))
        for name in todo.yields:
            if self.jobs[name].yield_():
                self._stop(self.jobs[name], StopSignal.YIELD)
        for name, workers in todo.starts.items():
            if missing := set(workers) - self.free:
                raise WorkersUnavailable(f"workers {sorted(missing)} are leased or dead")
            self._start(self.jobs[name], workers)
        if todo.starts:
            self._tell_levels()
        if self.policy.review_s is not None:
            self._review = self._background.later(self.policy.review_s, self._decide)

    def _tell_levels(self) -> None:
        """After any change of who runs: to the operator, and to what learns from it."""
        running = [job for job in self.jobs.values() if job.workers]
        self.speed.busy(sum(map(self._at_work, running)))
        self.metrics.level(
            waiting=self.waiting,
            running=len(running),
            free=len(self.free),
            busy=len(self.group.healthy & self.leased),
            down=self.config.workers - len(self.group.healthy),
            repairs=self.group.repaired,
            backlog_s=self.backlog_s(),
        )

    def _at_work(self, job: Job) -> int:
        """The number of busy workers of a running job."""
        parallel = job.request.shared(self.config.parallel)
        together = parallel.parallel_vae and self.facts.cuts_vae
        return busy_workers(len(job.workers or ()), job.decoding, together)

    def worker_out(self, index: int) -> None:
        """For `WorkerGroup`."""
        for job in self.jobs.values():
            if index in (job.workers or ()):
                job.break_off()
        self.record.out(index, died=False)
        self._wake()

    def worker_dead(self, worker: WorkerId) -> None:
        """For `WorkerGroup`."""
        self.record.out(worker.index, died=True)
        for job in self.jobs.values():
            job.lose(worker)

    def worker_ready(self, index: int) -> None:
        """For `WorkerGroup`."""
        self.record.back(index)
        self._wake()

    @asynccontextmanager
    async def at_rest(self) -> AsyncIterator[None]:
        """For `WorkerGroup`. Requests leave after the step that they are in, and go on afterwards."""
        self._resting = True
        try:
            for job in self.jobs.values():
                if job.yield_():
                    self._stop(job, StopSignal.YIELD)
            while self.leased:
                self._all_back.clear()
                await self._all_back.wait()
            yield
        finally:
            self._resting = False
            self._wake()

    def beyond_repair(self) -> None:
        """For `WorkerGroup`."""
        for job in list(self.jobs.values()):
            self._end_if_hopeless(job)

    def unfinished(self) -> tuple[Collection[int], int]:
        """For `WorkerGroup`."""
        return {job.number for job in self.jobs.values()}, self._accepted

    def _stop(self, job: Job, signal: StopSignal) -> None:
        for index in job.workers or ():
            if (member := self.group.member(index)) is not None:
                member.remote.stop(job.serial, signal)

    # Working

    def _start(self, job: Job, workers: tuple[int, ...]) -> None:
        """Send a gang off with a request."""
        self._segments += 1
        self.leased.update(workers)
        job.start(workers, self._segments)
        try:
            times = self.speed.model.times(len(workers), *job.view().shape)
            segment = RunningSegment(self.group, self.config, job, times)
        except Exception as error:
            log.exception("request %s could not be sent to workers %s", job.request.id, workers)
            self.leased.difference_update(workers)
            self._end(job, error)
            return
        self.record.began(job.serial, job.request.id, workers, job.step)
        self._background.spawn(self._work(job, segment))

    async def _work(self, job: Job, segment: RunningSegment) -> None:
        """One gang works on one request until it is done, yields, is cancelled or breaks.

        An error of the host's own ends this request; its gang, which may be anywhere, is replaced.
        """
        gang, began, serial, earlier = segment.workers, self.speed.now(), job.serial, len(job.segments)
        came: SegmentResult | None = None
        try:
            result = await segment.come_back(lambda progress: self._heard(job, progress))
            if job.state is not JobState.ENDED:  # as it is where the host has failed
                came = result
                self._take_back(job, result)
                self._conclude(job, result)
                self._learn(job, result, began)  # last: a picture that was drawn reaches its owner first
            if result.torn and len(gang) > 1 and all(map(self.group.alive, gang)):
                self.group.reform(gang)
        except Exception as error:
            log.exception("a segment of request %s failed", job.request.id)
            for worker in gang:
                self.group.replace(worker, f"the host failed in its segment: {error!r}")
            self._end(job, error)
        finally:
            self.record.ended(serial, came, next(iter(job.segments[earlier:]), None))
            self.leased.difference_update(worker.index for worker in gang)
            self._all_back.set()
            self._wake()

    def _take_back(self, job: Job, result: SegmentResult) -> None:
        """Take back what a gang brings."""
        job.come_back(result, {w: step for w, step in result.held.items() if self.group.alive(w)})
        for worker, rank in result.ranks.items():
            if rank.end in IN_ORDER:
                self.group.proved(worker)

    def _learn(self, job: Job, result: SegmentResult, began: Moment) -> None:
        """Count what a gang has done, and learn its speed and its adapters."""
        if result.worked:
            self.metrics.segment(job, result.worked)
            self.speed.learn(job, result, began)
        for worker, rank in result.ranks.items():
            member = self.group.member(worker.index)
            if member is not None and member.id == worker:
                self.metrics.adapters(member.adapters, rank.adapters)
                member.adapters = rank.adapters

    def _conclude(self, job: Job, result: SegmentResult) -> None:
        request = job.request
        if result.finished is not None:
            for warning in result.finished.warnings:
                log.warning("request %s: %s", request.id, warning)
            self._end(job, job.result(self.config.model.name, result.finished))
        elif result.error is not None:
            self._end(job, result.error)
        elif job.cancelled:
            self._end(job, GenerationCancelled(f"request {request.id} was cancelled at step {job.step}"))
        elif result.interrupted:
            job.breaks += 1
            self.metrics.gang_broke()
            causes = "; ".join(result.causes)
            log.warning("request %s: its gang broke, it is at step %d: %s", request.id, job.step, causes)
            if job.hopeless or job.breaks >= self.config.max_attempts:
                message = f"request {request.id}: {job.breaks} gangs broke under it: {causes}"
                self._end(job, GangBroken(message))
            else:
                job.tell(Repaired(request.id, tuple(worker.index for worker in result.lost), job.step))
        if job.state is JobState.WAITING:
            self._end_if_hopeless(job)

    def _can_serve(self, job: Job) -> bool:
        """Whether a gang of a size that suits it is there, or will be when repairs are done."""
        return any(map(job.view().allows, self.group.sizes))

    def _end_if_hopeless(self, job: Job) -> None:
        """End a request that waits for a gang that will never be there again."""
        if job.state is JobState.WAITING and not self._can_serve(job):
            kind = GangBroken if job.breaks else NotEnoughDevices  # who broke none may be drawn elsewhere
            self._end(job, kind(f"request {job.request.id}: {self.group.failure}"))

    def _heard(self, job: Job, progress: Progress) -> None:
        job.progress(progress)
        if job.decoding:
            self._tell_levels()

    def _end(self, job: Job, end: GenerationResult | BaseException) -> None:
        """The one place where a request ends."""
        if self.jobs.pop(job.request.id, None) is None:
            return
        job.end(end)
        self.metrics.ended(job, end)
        self._wake()
        for worker in job.held:
            if (remote := self.group.remote(worker)) is not None:
                remote.retain(*self.unfinished())

    def _fail(self, error: BaseException) -> None:
        """The policy or the host itself has a bug: nobody waits for ever, and no health check passes."""
        if self.fault is None:  # what follows from the first one is not what went wrong
            self.fault = error
            log.error("the policy or the host has a fault, and every request ends with it", exc_info=error)
        for job in list(self.jobs.values()):
            self._stop(job, StopSignal.CANCEL)  # nobody wants what its gang draws
            self._end(job, error)
