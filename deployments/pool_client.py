"""A router's client of one pool: what is known of its hosts, and calls to them through Serve."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from distriray.errors import NotEnoughDevices
from distriray.events import Event
from distriray.gang.background import Background
from distriray.handle import own_error
from distriray.requests import GenerationRequest, GenerationResult

from .config import PoolConfig
from .state import HostReport, PoolState

log = logging.getLogger("ray.serve.distriray")

ANSWER_S = 5.0  # timeout of a call to all hosts; a silent one is left to Serve's health check
REPORT_S = 1.0  # timeout of a poll of all hosts
ONE_REPORT_S = 0.5  # timeout per host where they are polled one by one, since one of them was silent
PATIENCE_S = 0.2  # longest wait of a request for a poll of hosts that are known already
NEWS_S = 3.0  # longest wait for a poll of a request that would be refused by what is known


class PoolClient:
    """One pool, as one router replica reaches it.

    Attributes:
        state: what is known of its hosts.
        undirected: requests under way that no host was chosen for, because there was none.
    """

    def __init__(self, config: PoolConfig, handle: DeploymentHandle, refresh_s: float) -> None:
        self.config = config
        self.state = PoolState(config.host)
        self.undirected = 0
        self._handle, self._streaming = handle, handle.options(stream=True)
        self._refresh_s = refresh_s
        self._polled_s = self._known_s = float("-inf")
        self._poll: asyncio.Task[None] | None = None
        self._background = Background(self._log)

    def poll_if_stale(self) -> None:
        """Begin to poll the hosts, unless they were polled a moment ago."""
        if time.monotonic() - self._polled_s >= self._refresh_s:
            self._start_poll()

    async def wait_briefly_for_poll(self) -> None:
        """Poll the hosts if what is known is stale; wait for the answers, but not for long."""
        self.poll_if_stale()
        if self._poll is not None and not self._poll.done():
            await asyncio.wait([self._poll], timeout=PATIENCE_S if self.state.hosts else None)

    async def poll_now(self) -> None:
        """Poll the hosts now, whenever they were polled last."""
        now_s = time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(NEWS_S):
                for _ in range(2):  # the hosts may be asked already, but since before now
                    if self._known_s < now_s:
                        await asyncio.wait([self._start_poll()])

    def _start_poll(self) -> asyncio.Task[None]:
        if self._poll is None or self._poll.done():
            self._poll = self._background.spawn(self._poll_hosts())
        return self._poll

    async def _poll_hosts(self) -> None:
        self._polled_s = asked_s = time.monotonic()
        try:
            answers = await self._together("report", REPORT_S, self.state.editions)
        except TimeoutError:
            asked_s = time.monotonic()
            answers = await self._each("report", ONE_REPORT_S, self.state.editions)
        reports = [answer for answer in answers if isinstance(answer, HostReport)]
        if answers and not reports:
            return  # that nobody answers does not mean that nobody is there
        self.state.learn(reports, asked_s)
        self._known_s = asked_s

    def _log(self, error: Exception) -> None:
        log.error("pool %s does not say how it is", self.config.name, exc_info=error)

    async def everyone(self, method: str, *args: Any) -> list[Any]:
        """The answers of all hosts that Serve would send a request to and that answer.

        A host that is silent is asked twice, and so are the others: `method` must be one that this suits.
        """
        try:
            answers = await self._together(method, ANSWER_S, *args)
        except TimeoutError:
            answers = await self._each(method, REPORT_S, *args)
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def _together(self, method: str, timeout_s: float, *args: Any) -> list[Any]:
        """Of every host its answer, or the error in place of one.

        Raises:
            TimeoutError: one is silent; the others' answers are lost with it.
        """
        broadcast = self._handle.broadcast(method, None, *args)
        try:
            answers: list[Any] = await broadcast.results_async(timeout_s=timeout_s, return_exceptions=True)
        except DeploymentUnavailableError:
            return []
        return answers

    async def _each(self, method: str, timeout_s: float, *args: Any) -> list[Any]:
        """The same of the hosts that are known, one after the other: Serve takes calls to one deployment that
        are made at once on behalf of one request for the same call."""
        answers: list[Any] = []
        for host in list(self.state.hosts):
            call = getattr(self._handle, method).remote(host, *args)
            try:
                answers.append(await asyncio.wait_for(call, timeout_s))
            except (TimeoutError, RayError) as error:
                answers.append(error)
        return answers

    async def generate(self, host: str | None, request: GenerationRequest) -> GenerationResult:
        """Let `host` make the images, or any host where it is None. Cancelling cancels the request.

        Raises:
            RayActorError: the host died.
            NotEnoughDevices: Serve cannot run the pool.
            DistrirayError: as `Host.generate`.
        """
        response = self._handle.generate.remote(host, request)
        self.undirected += host is None
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except RayTaskError as error:
            raise own_error(error) from None
        except DeploymentUnavailableError as error:
            raise self._unavailable() from error
        finally:
            self.undirected -= host is None

    async def stream(self, host: str | None, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """What happens to `request` on `host`; closing the generator cancels it. Raises as `generate`."""
        events = self._streaming.stream.remote(host, request)
        self.undirected += host is None
        waits = host is None
        over = False
        try:
            async for event in events:
                self.undirected -= waits
                waits = False
                yield event
            over = True
        except RayTaskError as error:
            over = True
            raise own_error(error) from None
        except DeploymentUnavailableError as error:
            over = True
            raise self._unavailable() from error
        finally:
            self.undirected -= waits
            if not over:
                events.cancel()

    def _unavailable(self) -> NotEnoughDevices:
        return NotEnoughDevices(f"pool {self.config.name} cannot be run; `serve status` says why")
