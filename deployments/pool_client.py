"""A router's client of one pool: what is known of its hosts, and calls to them through Serve."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.callers import this_actor
from deployments.config import PoolConfig, RouterConfig
from deployments.members import members_of
from deployments.pool_state import PoolState
from distriray.errors import NotEnoughDevices
from distriray.events import Event, Finished
from distriray.gang.background import Background
from distriray.handle import own_error
from distriray.requests import GenerationRequest
from distriray.results import GenerationResult
from distriray.status import HostNews

log = logging.getLogger("ray.serve.distriray")

ANSWER_S = 5.0  # timeout of a call to all hosts; a silent one is left to Serve's health check
REPORT_S = 1.0  # timeout of a host's report
PATIENCE_S = 0.2  # longest wait of a request for reports where something is known already
MEET_AGAIN_S = 0.01  # between two looks at whether Serve has said who is there
CALL_OFF_S, CALL_OFF_TRIES = 0.1, 20  # between two looks whether a host that woke has begun, and how many
ASK_AGAIN_S = 10.0  # wait for the report of a first host before any host is asked once more


class HostSilent(Exception):
    """A host was sent a request and did not say that it has it. Nothing was drawn as far as anybody knows."""


class PoolClient:
    """One pool, as one router replica reaches it.

    Attributes:
        state: what is known of its hosts.
        waking: requests that wait for a first host.
    """

    def __init__(
        self, config: PoolConfig, router: RouterConfig, handle: DeploymentHandle, draw: random.Random
    ) -> None:
        self.config = config
        self.state = PoolState(config.host)
        self.waking = 0
        self._draw = draw
        self._refresh_s, self._accept_s = router.refresh_s, router.accept_s
        self._wake_up: asyncio.Task[None] | None = None
        self._handle, self._streaming = handle, handle.options(stream=True)
        self._router = this_actor()
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._background = Background(self._log)

    async def look(self, choices: int, news: bool = False, adapters: Collection[str] = ()) -> list[str]:
        """Draw up to `choices` of the pool's hosts, and ask those for a report whose last one is old.

        Waits for the reports, but not for long. Hosts that were silent are asked too, and not waited for.

        Args:
            news: what was asked for before now does not do.
            adapters: one of those drawn holds all of these, if any host is known to.

        Returns:
            Those that have reported; if none has, those of which anything is known.
        """
        await self._meet()
        state, now_s = self.state, time.monotonic()
        since_s = now_s if news else now_s - self._refresh_s
        drawn = self._draw.sample(state.members, min(choices, len(state.members)))
        if adapters and drawn and (holders := state.holders(adapters)) and not set(holders) & set(drawn):
            drawn[-1] = self._draw.choice(holders)
        for _ in range(2):  # a host may be asked already, but since before now
            asks = {
                host: self._ask(host)
                for host in drawn
                if host in self._asking or state.asked_s(host) < since_s
            }
            if waited := [ask for host, ask in asks.items() if host not in state.silent]:
                await self._wait(waited, drawn, None if news else PATIENCE_S)
        answered = [host for host in drawn if state.knows(host, since_s)]
        known = [host for host in drawn if host in state.hosts]
        return answered or [host for host in known if host not in state.silent] or known

    async def _wait(self, asks: list[asyncio.Task[None]], drawn: list[str], patience_s: float | None) -> None:
        """Wait for reports, each of which comes or fails within `REPORT_S`."""
        _, rest = await asyncio.wait(asks, timeout=patience_s)
        if rest and not any(host in self.state.hosts for host in drawn):
            await asyncio.wait(rest, return_when=asyncio.FIRST_COMPLETED)

    def glance(self) -> None:
        """Ask one host for a report, if its last one is old; nobody waits for it."""
        self._background.spawn(self.look(1))

    async def _meet(self) -> None:
        """Learn from Serve who is there, which it tells a handle soon after it was made."""
        began_s = time.monotonic()
        while (members := members_of(self._handle)) is None and time.monotonic() - began_s < ANSWER_S:
            await asyncio.sleep(MEET_AGAIN_S)
        self.state.meet(members or ())

    def _ask(self, host: str) -> asyncio.Task[None]:
        if host not in self._asking:
            self.state.asked(host, time.monotonic())
            self._asking[host] = self._background.spawn(self._learn(host))
        return self._asking[host]

    async def _learn(self, host: str) -> None:
        asked_s = time.monotonic()
        try:
            report = await self._call(host, "report", REPORT_S, self.state.edition(host))
            self.state.learn(report, asked_s)
        except (TimeoutError, RayError, DeploymentUnavailableError):
            self.state.silent.add(host)  # that it does not answer does not mean that it is gone
        finally:
            del self._asking[host]

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
        answer = self._handle.report.remote(None, None)
        try:
            while True:
                try:
                    async with asyncio.timeout(ASK_AGAIN_S):
                        report = await answer
                    break
                except TimeoutError:  # Serve may have given the call to a host that hangs
                    former, answer = answer, self._handle.report.remote(None, None)
                    former.cancel()  # not before: while nobody waits, Serve starts no host
        except asyncio.CancelledError:
            answer.cancel()
            raise
        except DeploymentUnavailableError as error:
            raise self._unavailable() from error
        except RayError as error:
            log.warning("a host of pool %s was lost as it came up: %s", self.config.name, error)
            return
        self.state.learn(report, time.monotonic())

    def _log(self, error: Exception) -> None:
        log.error("pool %s does not say how it is", self.config.name, exc_info=error)

    async def everyone(self, method: str, *args: Any) -> list[Any]:
        """The answers of all hosts that Serve would send a request to and that answer."""
        await self._meet()
        return await self.answers(self.state.members, method, *args)

    async def answers(self, hosts: Sequence[str], method: str, *args: Any) -> list[Any]:
        """The answers of those of `hosts` that answer."""
        calls = [self._background.spawn(self._answer(host, method, *args)) for host in hosts]
        return [answer for call in calls for answer in await asyncio.shield(call)]

    async def _answer(self, host: str, method: str, *args: Any) -> list[Any]:
        try:
            return [await self._call(host, method, ANSWER_S, *args)]
        except (TimeoutError, RayError, DeploymentUnavailableError):
            return []

    async def members(self) -> tuple[str, ...]:
        """The names of all hosts, as Serve has told."""
        await self._meet()
        return self.state.members

    async def news(self, host: str, since: int) -> tuple[HostNews, float] | None:
        """As `Pool.news`; None from a host that does not answer."""
        return await asyncio.shield(self._background.spawn(self._news(host, since)))

    async def _news(self, host: str, since: int) -> tuple[HostNews, float] | None:
        try:
            return await self._call(host, "news", REPORT_S, since)
        except (TimeoutError, RayError, DeploymentUnavailableError):
            return None

    async def _call(self, host: str, method: str, timeout_s: float, *args: Any) -> Any:
        """The answer of one host.

        To be called in a context of nobody: Serve takes calls to one deployment that are made at once on
        behalf of one request for the same call.

        Raises:
            TimeoutError: it is silent.
            RayError, DeploymentUnavailableError
        """
        response = getattr(self._handle, method).remote(host, *args)
        try:
            async with asyncio.timeout(timeout_s):
                return await response
        except (TimeoutError, asyncio.CancelledError):
            response.cancel()
            raise

    async def generate(self, host: str, request: GenerationRequest) -> GenerationResult:
        """Let `host` make the images. Cancelling cancels the request.

        Raises:
            HostSilent: the host does not say that it has the request, which is cancelled there, or ends it
                without a result.
            RayActorError: the host died.
            NotEnoughDevices: Serve cannot run the pool.
            DistrirayError: as `Host.generate`.
        """
        async with aclosing(self._events("generate", host, request)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    return event.result
        raise AssertionError("events end with the result or an error")

    async def stream(self, host: str, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Events of `request` on `host`; closing the generator cancels it. Raises as `generate`."""
        async with aclosing(self._events("stream", host, request)) as events:
            async for event in events:
                yield event

    async def _events(
        self, method: str, host: str, request: GenerationRequest
    ) -> AsyncGenerator[Event, None]:
        """Events that `method` of a host yields: first, and at once, that the host has the request.

        They end with `Finished` or an error.
        """
        response = getattr(self._streaming, method).remote(host, request, self._router)
        events, over = aiter(response), False
        try:
            try:
                async with asyncio.timeout(self._accept_s):
                    event = await anext(events, None)
            except TimeoutError:
                message = f"host {host} did not accept request {request.id} within {self._accept_s:g} s"
                log.warning("%s; the request is cancelled there", message)
                self._background.spawn(self._call_off(host, request.id))
                raise HostSilent(message) from None
            except asyncio.CancelledError:  # the client left before the host has begun, if it ever does
                self._background.spawn(self._call_off(host, request.id))
                raise
            while event is not None:
                over = isinstance(event, Finished)
                yield event
                event = await anext(events, None)
            if not over:
                raise HostSilent(f"host {host} ended request {request.id} without a result")
        except RayTaskError as error:
            over = True
            raise own_error(error) from None
        except DeploymentUnavailableError as error:
            over = True
            raise self._unavailable() from error
        finally:
            if not over:
                response.cancel()

    async def _call_off(self, host: str, request_id: str) -> None:
        """Cancel what a silent host was sent, when it wakes: Ray asks again only when it has long begun."""
        try:
            for _ in range(CALL_OFF_TRIES):
                if await self._handle.cancel.remote(host, request_id):
                    return
                await asyncio.sleep(CALL_OFF_S)
        except (RayError, DeploymentUnavailableError):
            return  # it is gone, and what it had with it

    def _unavailable(self) -> NotEnoughDevices:
        return NotEnoughDevices(f"pool {self.config.name} cannot be run; `serve status` says why")
