"""A router's client of one pool: what is known of its hosts, and calls to them through Serve."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from distriray.errors import NotEnoughDevices
from distriray.events import Event, Finished
from distriray.gang.background import Background
from distriray.handle import own_error
from distriray.requests import GenerationRequest
from distriray.results import GenerationResult

from .config import PoolConfig
from .state import HostReport, PoolState

log = logging.getLogger("ray.serve.distriray")

ANSWER_S = 5.0  # timeout of a call to all hosts; a silent one is left to Serve's health check
REPORT_S = 1.0  # timeout of a poll of all hosts
ONE_REPORT_S = 0.5  # timeout per host where they are polled one by one, since one of them was silent
PATIENCE_S = 0.2  # longest wait of a request for a poll of hosts that are known already
ASK_AGAIN_S = 10.0  # wait for the report of a first host before any host is asked once more
NEWS_S = 3.0  # longest wait for a poll of a request that would be refused by what is known


class HostSilent(Exception):
    """A host was sent a request and did not say that it has it. Nothing was drawn as far as anybody knows."""


class PoolClient:
    """One pool, as one router replica reaches it.

    Args:
        accept_s: within which a host says that it has a request.

    Attributes:
        state: what is known of its hosts.
        waking: requests that wait for a first host.
    """

    def __init__(
        self, config: PoolConfig, handle: DeploymentHandle, refresh_s: float, accept_s: float = 5.0
    ) -> None:
        self.config = config
        self.state = PoolState(config.host)
        self.waking = 0
        self._accept_s = accept_s
        self._wake_up: asyncio.Task[None] | None = None
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

    async def wake(self) -> None:
        """Wait until a host is up, which Serve starts because somebody waits, and has reported.

        The request itself stays here meanwhile: its deadline runs, and it can be called off.

        Raises:
            NotEnoughDevices: Serve cannot run the pool.
        """
        self.waking += 1
        try:
            if self._wake_up is None or self._wake_up.done():
                self._wake_up = self._background.spawn(self._wait_for_host())
            await asyncio.shield(self._wake_up)
        finally:
            self.waking -= 1
            if not self.waking and self._wake_up is not None:
                self._wake_up.cancel()  # nobody wants a host any more
                self._wake_up = None

    async def _wait_for_host(self) -> None:
        answer = self._handle.report.remote(None, {})
        try:
            while True:
                try:
                    async with asyncio.timeout(ASK_AGAIN_S):
                        report = await answer
                    break
                except TimeoutError:  # Serve may have given the call to a host that hangs
                    former, answer = answer, self._handle.report.remote(None, {})
                    former.cancel()  # not before: while nobody waits, Serve starts no host
        except asyncio.CancelledError:
            answer.cancel()
            raise
        except DeploymentUnavailableError as error:
            raise self._unavailable() from error
        except RayError as error:
            log.warning("a host of pool %s was lost as it came up: %s", self.config.name, error)
            return
        if not self.state.hosts:  # it may be the only one that answers: a poll of all would not tell
            self.state.learn([report], time.monotonic())

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

    async def generate(self, host: str, request: GenerationRequest) -> GenerationResult:
        """Let `host` make the images. Cancelling cancels the request.

        Raises:
            HostSilent: the host does not say that it has the request, which is cancelled there.
            RayActorError: the host died.
            NotEnoughDevices: Serve cannot run the pool.
            DistrirayError: as `Host.generate`.
        """
        async with aclosing(self._events("generate", host, request)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    return event.result
        raise HostSilent(f"host {host} ended request {request.id} without a result")

    async def stream(self, host: str, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """What happens to `request` on `host`; closing the generator cancels it. Raises as `generate`."""
        async with aclosing(self._events("stream", host, request)) as events:
            async for event in events:
                yield event

    async def _events(
        self, method: str, host: str, request: GenerationRequest
    ) -> AsyncGenerator[Event, None]:
        """What `method` of a host tells: first, and at once, that the host has the request."""
        response = getattr(self._streaming, method).remote(host, request)
        events, over = aiter(response), False
        try:
            try:
                async with asyncio.timeout(self._accept_s):
                    first = await anext(events)
            except TimeoutError:
                message = f"host {host} did not accept request {request.id} within {self._accept_s:g} s"
                log.warning("%s; the request is cancelled there", message)
                raise HostSilent(message) from None
            yield first
            async for event in events:
                over = isinstance(event, Finished)
                yield event
        except RayTaskError as error:
            over = True
            raise own_error(error) from None
        except DeploymentUnavailableError as error:
            over = True
            raise self._unavailable() from error
        finally:
            if not over:
                response.cancel()

    def _unavailable(self) -> NotEnoughDevices:
        return NotEnoughDevices(f"pool {self.config.name} cannot be run; `serve status` says why")
