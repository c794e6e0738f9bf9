"""The fleet's events for all who watch over HTTP: looked up and encoded once, while anybody does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

from fastapi import Request
from starlette.requests import ClientDisconnect

from deployments.http.disconnect import KEEP_ALIVE, KEEP_ALIVE_S, cancel_on_disconnect
from deployments.http.errors import Refusal, log
from distriray.gang.background import Background
from distriray.service import FleetNews, Service
from distriray.status import HostNews, OutageStatus, SegmentStatus
from distriray.wire import Code

MAX_WATCHERS = 64  # of one router; each holds a connection, and Serve counts it among the router's requests
STREAM_S = 60.0  # after which a watcher asks anew, so that a router that is to stop need not wait for long
EACH_S = 0.3  # for each who watches, until the next look: so many events a second are told to all together
BEHIND = 16  # frames that a watcher may be behind before it is sent away
REMEMBERED_S = 90.0  # what ended before is not told to those who come
TOLD_AT_ONCE = 8192  # segments that they are told at most, beside those that run: the newest of each host


class Watch:
    """All watchers of one router. A watcher is first told what is remembered, then what changes."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._watchers: set[Watcher] = set()
        self._known: FleetNews | None = None
        self._looking: asyncio.Task[None] | None = None
        self._background = Background(lambda error: log.error("nobody can watch the fleet", exc_info=error))

    def join(self) -> Watcher:
        """A new watcher, who must be closed.

        Raises:
            Refusal (429): there are enough.
        """
        if len(self._watchers) >= MAX_WATCHERS:
            message = f"{MAX_WATCHERS} watch already, which is the limit; GET /v1/fleet says how things stand"
            raise Refusal(429, Code.TOO_MANY_WATCHERS, message, headers={"Retry-After": "10"})
        watcher = Watcher(self)
        self._watchers.add(watcher)
        if self._known is not None:
            watcher.tell(_frame(self._known.model_copy(update={"now": time.time()})))
        if self._looking is None:
            self._looking = self._background.spawn(self._look())
        return watcher

    def leave(self, watcher: Watcher) -> None:
        """For a watcher that is closed. Nobody looks on for nobody."""
        self._watchers.discard(watcher)
        if not self._watchers and self._looking is not None:
            self._looking.cancel()
            self._looking = self._known = None

    async def _look(self) -> None:
        try:
            async for news in self._service.watch():
                self._known = news if self._known is None else merged(self._known, news)
                frame = _frame(news)
                for watcher in self._watchers:
                    watcher.tell(frame)
                await asyncio.sleep(EACH_S * len(self._watchers))
        finally:
            if self._looking is asyncio.current_task():  # else whoever watches has come later
                self._looking = self._known = None
                for watcher in self._watchers:
                    watcher.tell(None)


class Watcher:
    """One who watches: `frames` are server-sent events."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue()

    def tell(self, frame: bytes | None) -> None:
        """Add a frame; None is the end, and so is whatever is told to one who does not keep up."""
        behind = self._queue.qsize()
        if behind <= BEHIND:
            self._queue.put_nowait(frame if behind < BEHIND else None)

    async def frames(self, request: Request) -> AsyncGenerator[bytes, None]:
        """Frames of the stream, until the client leaves or `STREAM_S` are over."""
        ends_s = time.monotonic() + STREAM_S
        try:
            while (left_s := ends_s - time.monotonic()) > 0:
                frame = await cancel_on_disconnect(request, self._next(left_s))
                if frame is None:
                    return
                yield frame
        except ClientDisconnect:
            request.state.noted["code"] = "client_left"

    async def aclose(self) -> None:
        """Watch no more."""
        self._watch.leave(self)

    async def _next(self, left_s: float) -> bytes | None:
        try:
            async with asyncio.timeout(min(KEEP_ALIVE_S, left_s)):
                return await self._queue.get()
        except TimeoutError:  # a timer may fire a little early: silence until the end is the end
            return KEEP_ALIVE if left_s > KEEP_ALIVE_S else None


def merged(known: FleetNews, news: FleetNews) -> FleetNews:
    """All that is known after `news`, for those who come later."""
    count = sum(len(pool.hosts) for pool in (*known.pools.values(), *news.pools.values()))
    share = TOLD_AT_ONCE // max(1, count)  # some hosts may be counted twice, and none is left out
    pools = {}
    for name, pool in news.pools.items():
        former = known.pools[name].hosts if name in known.pools else {}
        told = {host: _later(former.get(host), new, share) for host, new in pool.hosts.items()}
        silent = {
            *(known.pools[name].silent if name in known.pools else ()),
            *pool.silent,
        } - pool.hosts.keys()
        hosts = {host: one for host, one in {**former, **told}.items() if host not in pool.gone}
        update = {"hosts": hosts, "silent": tuple(sorted(silent - set(pool.gone))), "gone": ()}
        pools[name] = pool.model_copy(update=update)
    return news.model_copy(update={"complete": True, "pools": pools})


def _later(known: HostNews | None, news: HostNews, share: int) -> HostNews:
    """`news` with what is remembered of before: segments that run, and `share` of those that ended."""
    before: tuple[list[SegmentStatus], list[OutageStatus]] = ([], [])
    if known is not None:
        before = known.segments, known.outages
    since = news.now - REMEMBERED_S
    segments = {one.serial: one for one in (*before[0], *news.segments)}
    outages = {(one.worker, one.out_at): one for one in (*before[1], *news.outages)}
    ended = [one for one in segments.values() if one.ended_at is not None and one.ended_at > since]
    running = [one for one in segments.values() if one.ended_at is None]
    recent = [*ended[max(0, len(ended) - share) :], *running]
    out = [one for one in outages.values() if one.back_at is None or one.back_at > since]
    return news.model_copy(update={"segments": recent, "outages": out})


def _frame(news: FleetNews) -> bytes:
    return f"event: fleet.news\ndata: {news.model_dump_json(exclude_none=True)}\n\n".encode()
