"""A pool: each replica is one host, with workers in the replica's own placement group."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from ray import serve

from deployments.autoscaling import BACKLOG_S
from deployments.callers import Callers, dead_actors
from deployments.config import PoolConfig
from deployments.host_report import HostKnowledge, HostReport, shifted
from deployments.logs import leave_out_calls, shorten_refusals
from deployments.pool_client import ANSWER_S
from deployments.pool_state import wait_s
from distriray.events import Event, Finished, Queued
from distriray.gang import Host
from distriray.requests import GenerationRequest
from distriray.routing.router import HostState, publish
from distriray.status import HostNews, HostStatus


def state_of(name: str, host: Host) -> HostState:
    """The state of a host as routing sees it; times count from now."""
    view, repair_s = host.view(), host.repair_s()
    repaired = range(0 if repair_s is None else host.config.workers)
    state = publish(name, view, host.latency, host.config.max_queue, repaired, repair_s or 0.0)
    return shifted(replace(state, adapters=host.adapters), -view.now_s)


def report_of(name: str, host: Host, configured: int, known: str | None) -> HostReport:
    """The report of a host, configured that many times, to a router that has the edition `known`."""
    adapters = host.catalogue.names  # which looks at their folder again, and so before the edition is read
    edition = f"{configured}.{host.latency.observations}.{host.catalogue.edition}"
    new = HostKnowledge(host.latency, host.facts, host.config, adapters) if edition != known else None
    return HostReport(state_of(name, host), edition, new)


class Pool:
    """One host of a pool. `target` is for `ToNamedHost`, which has acted on it before a call gets here.

    `router` is the actor that asks: what it asked for ends with it.
    """

    def __init__(self, config: PoolConfig) -> None:
        shorten_refusals()
        leave_out_calls()
        self._config = config
        self._name: str = serve.get_replica_context().replica_id.unique_id
        self._started: Host | None = None
        self._configured = 0
        self._callers = Callers(lambda name: self._host.cancel(name), dead_actors)

    @property
    def _host(self) -> Host:
        assert self._started is not None, "Serve calls reconfigure before anything else"
        return self._started

    async def reconfigure(self, live: dict[str, Any]) -> None:
        """Take Serve's `user_config` over: start the host with it, or let requests that run go on."""
        config = self._config.changed(live).host
        self._configured += 1
        if self._started is None:
            self._started = await Host.start(config)
        else:
            self._started.configure(config)

    async def generate(
        self, target: str | None, request: GenerationRequest, router: str | None = None
    ) -> AsyncGenerator[Event, None]:
        """Generate: yields at once that the host has the request, and in the end the result."""
        async with aclosing(self.stream(target, request, router)) as events:
            async for event in events:
                if isinstance(event, Queued | Finished):
                    yield event

    async def stream(
        self, target: str | None, request: GenerationRequest, router: str | None = None
    ) -> AsyncGenerator[Event, None]:
        """As `Host.stream`."""
        with self._callers.waiting(router, request.id):
            async with aclosing(self._host.stream(request)) as events:
                async for event in events:
                    yield event

    async def cancel(self, target: str | None, request_id: str) -> bool:
        """Stop a request after the step it is in; whether there was one."""
        return await self._host.cancel(request_id)

    async def report(self, target: str | None, known: str | None) -> HostReport:
        """The report that routers decide by, without what edition `known` already held."""
        return report_of(self._name, self._host, self._configured, known)

    async def status(self, target: str | None) -> tuple[str, HostStatus]:
        """The host's name and what it is doing."""
        return self._name, self._host.status()

    async def news(self, target: str | None, since: int) -> tuple[HostNews, float | None]:
        """Changes since an edition, and the seconds that a request arriving now would wait, as `wait_s`."""
        return self._host.news(since), wait_s([state_of(self._name, self._host)], 0.0)

    async def ping(self, target: str | None) -> int:
        """The number of workers that answer."""
        return await self._host.ping(timeout_s=ANSWER_S / 2)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `QueuedWork`."""
        return {BACKLOG_S: self._host.backlog_s()}

    async def check_health(self) -> None:
        """For Serve, which replaces a replica whose check fails."""
        await self._host.check_health()

    async def __del__(self) -> None:
        if self._started is not None:
            await self._started.close()
