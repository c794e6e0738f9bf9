"""A router's client of one pool: what is known of its hosts, and calls to them through Serve."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from contextvars import Context
from math import inf
from typing import Any

from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.callers import this_actor
from deployments.config import PoolConfig, RouterConfig
from deployments.members import members_of
from deployments.pool_state import PoolState
from distriray.errors import NotEnoughDevices, QueueFull
from distriray.events import Event, Finished
from distriray.gang.background import Background
from distriray.handle import is_cancelled, own_error
from distriray.requests import GenerationRequest
from distriray.results import GenerationResult
from distriray.status import HostNews

log = logging.getLogger("ray.serve.distriray")

ANSWER_S = 5.0  # timeout of a call to all hosts; a silent one is left to Serve's health check
REPORT_S = 1.0  # timeout of a host's report
PATIENCE_S = 0.2  # longest wait of a request for reports where something is known already
MEET_AGAIN_S = 0.01  # between two looks at whether Serve has said who is there
CALL_OFF_S, CALL_OFF_TRIES = 0.1, 20  # between two looks whether a host that woke has begun, and how many
OTHERS_S = 0.5  # between two looks for a host of the model where others still serve
ASK_AGAIN_S = 10.0  # wait for the report of a first host before any host is asked once more

UNANSWERED = (TimeoutError, RayError, RayServeException)
"""Errors of a call that is left unanswered, by Ray's fault, by Serve's or by a host's."""


class HostSilent(Exception):
    """A host was sent a request and did not say that it has it, or never said what came of it."""


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
        self._calling_off: dict[tuple[str, str], asyncio.Task[None]] = {}
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
        until_s = inf if news else now_s + PATIENCE_S
        members = [host for host in state.members if host not in state.others]
        drawn = self._draw.sample(members, min(choices, len(members)))
        if adapters and drawn and (holders := state.holders(adapters)) and not set(holders) & set(drawn):
            drawn[-1] = self._draw.choice(holders)
        for _ in range(2):  # a host may be asked already, but since before now
            asks = {
                host: self._ask(host)
                for host in drawn
                if host in self._asking or state.asked_s(host) < since_s
            }
            if waited := [ask for host, ask in asks.items() if host not in state.silent]:
                await self._wait(waited, drawn, until_s)
        answered = [host for host in drawn if state.knows(host, since_s)]
        known = [host for host in drawn if host in state.hosts]
        return answered or [host for host in known if host not in state.silent] or known

    async def _wait(self, asks: list[asyncio.Task[None]], drawn: list[str], until_s: float) -> None:
        """Wait for reports, each of which comes or fails within `REPORT_S`."""
        left_s = None if until_s == inf else max(0.0, until_s - time.monotonic())
        _, rest = await asyncio.wait(asks, timeout=left_s)
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
            if report.state.host in self.state.members:  # else it has left meanwhile
                self.state.learn(report, asked_s)
        except UNANSWERED:
            self.state.silent.add(host)  # that it does not answer does not mean that it is gone
        finally:
            del self._asking[host]

    async def wake(self) -> None:
        """Wait until a host of the model is up, which Serve starts because somebody waits, and has reported.

        The request itself stays here meanwhile: its deadline runs, and it can be called off.

        Raises:
            NotEnoughDevices: Serve cannot run the pool, or it has another model by now.
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
                    self.state.learn(report, time.monotonic())
                    if (host := report.state.host) not in self.state.others:
                        return
                    if self.state.replaced_by(host):
                        raise NotEnoughDevices(f"pool {self.config.name} has another model by now")
                    await asyncio.sleep(OTHERS_S)
                    answer = self._handle.report.remote(None, None)
                except TimeoutError:  # Serve may have given the call to a host that hangs
                    former, answer = answer, self._handle.report.remote(None, None)
                    former.cancel()  # not before: while nobody waits, Serve starts no host
        except asyncio.CancelledError:
            answer.cancel()
            if is_cancelled():
                raise
            log.warning("a call to wake pool %s was cancelled", self.config.name)
            return
        except DeploymentUnavailableError as error:
            raise self._unavailable() from error
        except (RayError, RayServeException) as error:
            log.warning("a host of pool %s was lost as it came up: %s", self.config.name, error)

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
        except UNANSWERED:
            return []

    async def members(self) -> tuple[str, ...]:
        """The names of all hosts, as Serve has told."""
        await self._meet()
        return self.state.members

    async def news(self, host: str, since: int) -> tuple[HostNews, float | None] | None:
        """As `Pool.news`; None from a host that does not answer, or is not there any more."""
        return await asyncio.shield(self._background.spawn(self._news(host, since)))

    async def _news(self, host: str, since: int) -> tuple[HostNews, float | None] | None:
        if host not in (members_of(self._handle) or ()):
            return None  # any other would answer in its place
        try:
            return await self._call(host, "news", REPORT_S, since)
        except UNANSWERED:
            return None

    async def _call(self, host: str, method: str, timeout_s: float, *args: Any) -> Any:
        """The answer of one host.

        To be called in a context of nobody: Serve takes calls to one deployment that are made at once on
        behalf of one request for the same call.

        Raises:
            TimeoutError: it is silent.
            RayError, RayServeException
        """
        response = getattr(self._handle, method).remote(host, *args)
        try:
            async with asyncio.timeout(timeout_s):
                return await response
        except (TimeoutError, asyncio.CancelledError) as error:
            response.cancel()
            if isinstance(error, TimeoutError) or is_cancelled():
                raise
            raise TaskCancelledError from None

    async def generate(self, host: str, request: GenerationRequest, again: bool = False) -> GenerationResult:
        """Let `host` make the images. Cancelling cancels the request.

        Args:
            again: the host was sent it before, in vain.

        Raises:
            HostSilent: the host does not say that it has the request, which is cancelled there, or what came
                of it is lost.
            RayActorError: the host died, or cannot be reached.
            QueueFull: as `Host.generate`, or Serve has a bound of its own.
            NotEnoughDevices: Serve cannot run the pool.
            DistrirayError: as `Host.generate`.
        """
        async with aclosing(self._events("generate", host, request, again)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    return event.result
        raise AssertionError("events end with the result or an error")

    def stream(
        self, host: str, request: GenerationRequest, again: bool = False
    ) -> AsyncGenerator[Event, None]:
        """Events of `request` on `host`; closing the generator cancels it. As `generate`."""
        return self._events("stream", host, request, again)

    async def _events(
        self, method: str, host: str, request: GenerationRequest, again: bool
    ) -> AsyncGenerator[Event, None]:
        """Events that `method` of a host yields: first, and at once, that the host has the request.

        They end with `Finished` or an error.
        """
        if again or (host, request.id) in self._calling_off:  # of an earlier caller, who left
            await self._cleared(host, request)
        response = getattr(self._streaming, method).remote(host, request, self._router)
        events, leaves, over = aiter(response), True, False
        try:
            async with asyncio.timeout(self._accept_s):
                event = await anext(events, None)
            while event is not None:
                leaves, over = False, isinstance(event, Finished)
                yield event
                event = await anext(events, None)
            if not over:
                raise self._silent(host, request, "ended it without a result")
        except RayTaskError as error:
            over = True
            raise own_error(error) from None
        except DeploymentUnavailableError as error:
            over = True
            raise self._unavailable() from error
        except BackPressureError as error:
            over = True
            raise QueueFull(f"pool {self.config.name}: {error}", error.retry_after_s or 1.0) from error
        except RayActorError as error:
            leaves = not isinstance(error, ActorDiedError)
            raise
        except (RayError, RayServeException) as error:
            leaves = True
            raise self._silent(host, request, f"lost it: {error!r}") from error
        except TimeoutError:
            leaves = True
            raise self._silent(host, request, f"did not accept it within {self._accept_s:g} s") from None
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            leaves = True
            raise self._silent(host, request, "was told by somebody else to stop it") from None
        finally:
            if not over:
                response.cancel()
                if leaves:  # the host may not have begun, and begin yet
                    self._call_off(host, request.id)

    def _silent(self, host: str, request: GenerationRequest, what: str) -> HostSilent:
        message = f"host {host} was sent request {request.id} and {what}"
        log.warning("%s; the request is cancelled there", message)
        return HostSilent(message)

    def _call_off(self, host: str, request_id: str) -> None:
        """Cancel what a host was sent that may not know of it yet, or is not known to have ended it."""
        place = host, request_id
        if place not in self._calling_off:
            task = self._calling_off[place] = self._background.spawn(self._called_off(host, request_id))
            task.add_done_callback(lambda _: self._calling_off.pop(place), context=Context())

    async def _called_off(self, host: str, request_id: str) -> None:
        """Cancel it when the host wakes: Ray asks again only when it has long begun."""
        try:
            for _ in range(CALL_OFF_TRIES):
                if host not in (members_of(self._handle) or ()):
                    return  # others know nothing of it, and none is to be started to say so
                if await self._handle.cancel.remote(host, request_id):
                    return
                await asyncio.sleep(CALL_OFF_S)
        except (RayError, RayServeException):
            return  # it is gone, and what it had with it

    async def _cleared(self, host: str, request: GenerationRequest) -> None:
        """Wait until a host has nothing more of a request that was called off there.

        It would refuse the same again, or have it cancelled too. Raises HostSilent if it does not answer.
        """
        if (calling_off := self._calling_off.get((host, request.id))) is not None:
            patience_s = self._accept_s + CALL_OFF_S * CALL_OFF_TRIES
            _, hung = await asyncio.wait([calling_off], timeout=patience_s)
            if hung:
                raise self._silent(host, request, f"did not stop it within {patience_s:g} s")
        while any(await self.answers([host], "cancel", request.id)):  # after the step that it is in
            await asyncio.sleep(CALL_OFF_S)

    def _unavailable(self) -> NotEnoughDevices:
        return NotEnoughDevices(
            f"pool {self.config.name} is deleted, or could not be started; `serve status` says which"
        )
