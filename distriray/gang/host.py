"""A host: workers on one node, lent out in gangs to the requests it is given."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from ..errors import GangBroken
from ..requests import GenerationRequest, GenerationResult
from ..routing.elastic import Elastic
from ..routing.latency import LatencyModel, Profile
from ..routing.policy import EarliestDeadlineFirst, HostPolicy, HostView
from ..version import __version__
from .config import LIVE_FIELDS, HostConfig
from .crew import result_of
from .dispatcher import Dispatcher
from .events import Event, Finished
from .messages import WorkerFacts
from .placement import Placement
from .profile import device_of, measure
from .speed import Speed
from .status import HostStatus, RepairStatus, RequestStatus, WorkerStatus


class Host:
    """Workers on one node, lent out in gangs. Inside a Serve replica as in a script.

    Everything belongs to the event loop that `start` ran in. Use `Host.start`, not the constructor.
    """

    def __init__(self, config: HostConfig, placement: Placement, policy: HostPolicy) -> None:
        self.config = config
        self._placement = placement
        self._dispatcher = Dispatcher(config, placement, policy)
        self._closed = False

    @classmethod
    async def start(cls, config: HostConfig, policy: HostPolicy | None = None) -> Host:
        """Reserve the bundles, start and load the workers, form every gang once.

        Args:
            policy: decides which request runs where, in place of the configuration's.

        Raises:
            NotEnoughDevices: the cluster is too small.
            ModelNotFound, UnsupportedModel: the model cannot be loaded or cannot be cut into patches.
        """
        host = cls(config, await Placement.make(config), policy or _policy_of(config))
        try:
            await host._dispatcher.start()
            if config.profiles is not None:
                await host._learn(config.profiles)
        except BaseException:
            await host.close()
            raise
        return host

    async def _learn(self, folder: Path) -> None:
        """Start from the profile kept in `folder`; measure and keep one if there is none."""
        facts = self._dispatcher.facts
        path = Profile.path(folder, facts.model, device_of(self.config, facts), __version__)
        if not path.exists():
            (await measure(self)).save(path)
            self._dispatcher.metrics.begin()
        self._dispatcher.speed = Speed(Profile.load(path))

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        """Make the images of `request`. Cancelling this coroutine cancels the request.

        Raises:
            InvalidRequest, QueueFull: at once.
            GenerationCancelled: somebody called `cancel`, or the host is closed.
            GangBroken: its gang broke more often than the configuration allows.
        """
        job = self._dispatcher.accept(request)
        try:
            return await asyncio.shield(job.ended)
        except asyncio.CancelledError:
            self._dispatcher.cancel(job)
            raise

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """What happens to `request`, ending with `Finished`. Closing the generator cancels the request.

        Raises as `generate` does.
        """
        job = self._dispatcher.accept(request)
        events = job.events
        try:
            while not (job.ended.done() and events.empty()):
                news = asyncio.ensure_future(events.get())
                watched: list[asyncio.Future[Any]] = [news, job.ended]
                try:
                    await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not news.done():
                        news.cancel()
                if news.done() and not news.cancelled():
                    yield news.result()
            yield Finished(job.request.id, job.ended.result())
        finally:
            self._dispatcher.cancel(job)

    async def cancel(self, request_id: str) -> bool:
        """Stop a request after the step it is in; whether there was one."""
        job = self._dispatcher.jobs.get(request_id)
        if job is None:
            return False
        self._dispatcher.cancel(job)
        return True

    def status(self) -> HostStatus:
        """Queue, gangs, workers, repairs, and how long what was accepted will take."""
        dispatcher, now = self._dispatcher, time.monotonic()
        working = {w: job.request.id for job in dispatcher.jobs.values() for w in job.workers or ()}
        requests = {
            job: RequestStatus(
                id=job.request.id,
                step=job.step,
                num_steps=job.num_steps,
                waited_s=now - job.arrival,
                workers=job.workers,
            )
            for job in dispatcher.jobs.values()
        }
        return HostStatus(
            model=self.config.model.name,
            device=self._placement.device,
            healthy=dispatcher.healthy,
            gang_sizes=self.config.sizes,
            default_size=dispatcher.facts.default_size,
            workers=[
                WorkerStatus(
                    index=index,
                    healthy=index in dispatcher.crew.healthy,
                    pid=facts.pid,
                    device=facts.device,
                    load_s=facts.load_s,
                    memory=dispatcher.crew.memory[index],
                    request=working.get(index),
                )
                for index, facts in sorted(dispatcher.crew.facts.items())
            ],
            free_workers=len(dispatcher.blocks.free),
            running=[status for job, status in requests.items() if job.workers],
            waiting=[status for job, status in requests.items() if not job.workers],
            max_queue=self.config.max_queue,
            work_s=self.work_s(),
            repairs=[
                RepairStatus(worker=r.worker, cause=r.cause, seconds=r.seconds)
                for r in dispatcher.crew.repairs
            ],
            outcomes=dict(dispatcher.metrics.outcomes),
            regroupings=dispatcher.metrics.regroupings,
            predictions=dispatcher.metrics.predictions(),
        )

    @property
    def facts(self) -> WorkerFacts:
        """What the first worker reported of its model and device."""
        return self._dispatcher.facts

    @property
    def latency(self) -> LatencyModel:
        """What the host believes of its speed."""
        return self._dispatcher.speed.model

    def view(self) -> HostView:
        """What a policy or a router may know now."""
        return self._dispatcher.view()

    def work_s(self) -> float:
        """Predicted seconds until everything accepted is finished, were it spread evenly."""
        return self._dispatcher.work_s()

    def configure(self, config: HostConfig) -> None:
        """Go on with another configuration: from the next request, segment and decision on it counts.

        Raises:
            ValueError: it differs in a field that cannot change while the host runs.
        """
        fixed = [
            field
            for field in HostConfig.model_fields
            if field not in LIVE_FIELDS and getattr(config, field) != getattr(self.config, field)
        ]
        if fixed:
            raise ValueError(f"{fixed} cannot change while a host runs; {sorted(LIVE_FIELDS)} can")
        if config.policy != self.config.policy:
            self._dispatcher.policy = _policy_of(config)
        self.config = self._dispatcher.config = config

    async def ping(self, timeout_s: float = 5.0) -> int:
        """How many workers answer within `timeout_s`."""
        answers = [result_of(handle.ping.remote()) for handle in self._dispatcher.crew.handles.values()]
        if not answers:
            return 0
        done, _ = await asyncio.wait(answers, timeout=timeout_s)
        return sum(answer.exception() is None for answer in done)

    async def check_health(self) -> None:
        """Return if the host can serve.

        Raises:
            GangBroken: a worker is beyond repair.
            Exception: whatever went wrong in the policy or in the host itself.
        """
        if self._dispatcher.fault is not None:
            raise self._dispatcher.fault
        if self._dispatcher.crew.failure is not None:
            raise GangBroken(self._dispatcher.crew.failure)

    async def close(self) -> None:
        """Cancel what is unfinished, end the workers, give the bundles back. Idempotent."""
        if not self._closed:
            self._closed = True
            await self._dispatcher.close()
            self._placement.release()


def _policy_of(config: HostConfig) -> HostPolicy:
    return Elastic() if config.policy == "elastic" else EarliestDeadlineFirst()
