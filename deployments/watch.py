"""The fleet's events for those who watch: hosts are polled in turn, at a bounded pace."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence

from deployments.pool_client import PoolClient
from distriray.service import FleetNews, PoolNews
from distriray.status import HostNews

LOOK_S = 1.0  # from one look to the next
AT_ONCE = 32  # hosts that a look asks; of more, each is asked every second, third, … time


class _Pool:
    """State of a pool as told so far."""

    def __init__(self, client: PoolClient) -> None:
        self.client = client
        self._there: tuple[str, ...] = ()
        self._told: dict[str, tuple[HostNews, float | None]] = {}
        self._silent: set[str] = set()

    async def meet(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The hosts that there are, and those that are no more since this was last asked."""
        former, self._there = self._there, await self.client.members()
        gone = tuple(host for host in former if host not in self._there)
        for host in gone:
            self._told.pop(host, None)
            self._silent.discard(host)
        return self._there, gone

    async def look(self, hosts: Sequence[str], gone: tuple[str, ...]) -> PoolNews:
        """Ask these hosts; what is new."""
        editions = [self._told[host][0].edition if host in self._told else 0 for host in hosts]
        answers = await asyncio.gather(*map(self.client.news, hosts, editions))
        news: dict[str, HostNews] = {}
        silent: list[str] = []
        for host, answer in zip(hosts, answers, strict=True):
            if answer is None:
                self._told.pop(host, None)  # when it answers again, it says all
                silent += [host] if host not in self._silent else []
                self._silent.add(host)
                continue
            self._silent.discard(host)
            new, wait_s = _on_clock(answer[0], time.time()), answer[1]
            now = (new.model_copy(update={"segments": [], "outages": []}), wait_s)
            if host not in self._told or not _same(now, self._told[host]):
                news[host] = new
            self._told[host] = now
        return PoolNews(
            model=self.client.config.model.name,
            predicted_wait_s=min((wait for _, wait in self._told.values() if wait is not None), default=None),
            hosts=news,
            silent=tuple(silent),
            gone=gone,
        )


async def watch(clients: Sequence[PoolClient], refused: Callable[[], int]) -> AsyncGenerator[FleetNews, None]:
    """Changes in the fleet, look by look; `refused` says how many requests this router has turned away."""
    pools = {client.config.name: _Pool(client) for client in clients}
    turn: deque[tuple[str, str]] = deque()
    complete, told = True, 0
    while True:
        began_s = time.monotonic()
        gone: dict[str, tuple[str, ...]] = {}
        if not turn:
            for name, pool in pools.items():
                there, gone[name] = await pool.meet()
                turn.extend((name, host) for host in there)
        asked = [turn.popleft() for _ in range(min(AT_ONCE, len(turn)))]
        looks = [
            pool.look([host for of, host in asked if of == name], gone.get(name, ()))
            for name, pool in pools.items()
        ]
        found = dict(zip(pools, await asyncio.gather(*looks), strict=True))
        changed = complete or any(news.hosts or news.silent or news.gone for news in found.values())
        if changed or refused() != told:
            told = refused()
            yield FleetNews(now=time.time(), complete=complete, refused=told, pools=found)
            complete = False
        await asyncio.sleep(max(0.0, began_s + LOOK_S - time.monotonic()))


def _on_clock(news: HostNews, now: float) -> HostNews:
    """`news` with times of the clock that shows `now`, if the host's differs by a second or more."""
    by = round(now - news.now)
    if by == 0:  # so that what is told twice is told alike, whatever the answer took
        return news

    def moved(time: float | None) -> float | None:
        return None if time is None else time + by

    segments = [
        one.model_copy(update={"began_at": one.began_at + by, "ended_at": moved(one.ended_at)})
        for one in news.segments
    ]
    outages = [
        one.model_copy(update={"out_at": one.out_at + by, "back_at": moved(one.back_at)})
        for one in news.outages
    ]
    return news.model_copy(update={"now": news.now + by, "segments": segments, "outages": outages})


def _same(one: tuple[HostNews, float | None], other: tuple[HostNews, float | None]) -> bool:
    """Whether nothing has changed but the time."""
    return one == (other[0].model_copy(update={"now": one[0].now}), other[1])
