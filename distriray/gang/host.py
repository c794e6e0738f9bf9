"""A host: workers on one node, lent out in gangs to the requests it is given."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from distriray.adapters import Catalogue
from distriray.errors import GangBroken
from distriray.events import Event, Finished
from distriray.gang.admission import check_parallel
from distriray.gang.calibrate import keep_profile
from distriray.gang.config import LIVE_FIELDS, HostConfig
from distriray.gang.dispatcher import Dispatcher
from distriray.gang.job import Job
from distriray.gang.messages import WorkerFacts
from distriray.gang.placement import Placement
from distriray.gang.remote import Launcher
from distriray.gang.speed import Speed
from distriray.gang.status import news_of, status_of
from distriray.requests import GenerationRequest
from distriray.results import GenerationResult
from distriray.routing.latency import LatencyModel
from distriray.routing.policies import make_policy
from distriray.routing.policy import HostPolicy, HostView
from distriray.status import HostNews, HostStatus


class Host:
    """Workers on one node, lent out in gangs. Inside a Serve replica as in a script.

    Everything belongs to the event loop that `start` ran in. Use `Host.start`, not the constructor.
    """

    def __init__(self, config: HostConfig, placement: Placement, policy: HostPolicy) -> None:
        self.config = config
        self._placement = placement
        name = placement.group.id.hex()[:8]
        self._dispatcher = Dispatcher(config, Launcher(config, placement), policy, name)
        self._closed = False

    @classmethod
    async def start(cls, config: HostConfig, policy: HostPolicy | None = None) -> Host:
        """Reserve the bundles, start and load the workers, form every gang once.

        Args:
            policy: decides which request runs where, in place of the configuration's.

        Raises:
            NotEnoughDevices: the cluster is too small.
            ModelNotFound, UnsupportedModel: the model cannot be loaded or cannot be cut into patches.
            UnusableAdapter: one that the configuration lists does not fit the model.
        """
        placement = await Placement.make(config)
        try:
            host = cls(config, placement, policy or make_policy(config.policy))
        except BaseException:
            placement.release()
            raise
        try:
            await host._dispatcher.start()
            if config.profiles is not None:
                await host._learn(config.profiles)
        except BaseException:
            await host.close()
            raise
        return host

    async def _learn(self, folder: Path) -> None:
        """Start from a profile that is kept in `folder` or measured now."""
        dispatcher = self._dispatcher

        async def generate(request: GenerationRequest) -> GenerationResult:
            return await self._end_of(dispatcher.accept_own(request))

        dispatcher.speed = Speed(await keep_profile(folder, self.config, dispatcher.facts, generate))
        dispatcher.metrics.begin()

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        """Make the images of `request`. Cancelling this coroutine cancels the request.

        Raises:
            InvalidRequest, AdapterNotFound, QueueFull: at once.
            NotEnoughDevices: the workers for it are beyond repair.
            UnusableAdapter: the file of an adapter that it names does not fit the model.
            GenerationCancelled: somebody called `cancel`, or the host is closed.
            GangBroken: its gang broke more often than the configuration allows.
        """
        return await self._end_of(self._dispatcher.accept(request))

    async def _end_of(self, job: Job) -> GenerationResult:
        """Its result, or its error as it is raised; cancelling this coroutine cancels the request."""
        try:
            return await asyncio.shield(job.ended)
        except asyncio.CancelledError:
            self._dispatcher.cancel(job)
            raise

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Events of `request`, ending with `Finished`. Closing the generator cancels the request.

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
        return status_of(self._dispatcher, self._placement.device)

    def news(self, since: int) -> HostNews:
        """Changes since an edition (0 for all that is remembered), and the status now."""
        return news_of(self._dispatcher, self._placement.device, since)

    @property
    def sizes(self) -> set[int]:
        """Sizes of the gangs that can be formed, now or when repairs are done."""
        return self._dispatcher.group.sizes

    @property
    def facts(self) -> WorkerFacts:
        """Facts that the first worker reported of its model and device."""
        return self._dispatcher.facts

    @property
    def catalogue(self) -> Catalogue:
        """The adapters that requests may name."""
        return self._dispatcher.catalogue

    @property
    def adapters(self) -> frozenset[str]:
        """The names of adapters that a worker holds, of each worker those that it used last."""
        return self._dispatcher.adapters

    @property
    def latency(self) -> LatencyModel:
        """The host's estimate of its own speed."""
        return self._dispatcher.speed.model

    def view(self) -> HostView:
        """The view of a policy or a router now."""
        return self._dispatcher.view()

    def repair_s(self) -> float | None:
        """Predicted seconds until the workers that are being replaced are back; None where none is."""
        return self._dispatcher.repair_s()

    def backlog_s(self) -> float:
        """Predicted seconds until everything accepted is finished, were it spread evenly."""
        return self._dispatcher.backlog_s()

    def configure(self, config: HostConfig) -> None:
        """Go on with another configuration: from the next request, segment and decision on it counts.

        Raises:
            ValueError: it differs in a field that cannot change while the host runs, or gangs cannot share
                the model's steps as it says; nothing has changed then.
        """
        fixed = [
            field
            for field in HostConfig.model_fields
            if field not in LIVE_FIELDS and getattr(config, field) != getattr(self.config, field)
        ]
        if fixed:
            raise ValueError(f"{fixed} cannot change while a host runs; {sorted(LIVE_FIELDS)} can")
        check_parallel(config.parallel, config.sizes, self.facts)
        if config.policy != self.config.policy:
            self._dispatcher.policy = make_policy(config.policy)
        self.config = self._dispatcher.config = config

    async def ping(self, timeout_s: float = 5.0) -> int:
        """The number of workers that answer within `timeout_s`."""
        answers = [member.remote.ping() for member in self._dispatcher.group.members]
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
        if self._dispatcher.group.failure is not None:
            raise GangBroken(self._dispatcher.group.failure)

    async def close(self) -> None:
        """Cancel what is unfinished, end the workers, give the bundles back. Idempotent."""
        if not self._closed:
            self._closed = True
            try:
                await self._dispatcher.close()
            finally:
                self._placement.release()
