"""Looks at the fleet: what is new, from so many hosts at once, whoever is silent."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from deployments import watch as looks
from deployments.watch import watch
from distriray.service import FleetNews
from distriray.status import HostNews, OutageStatus

from ..http.test_watch import host as news
from ..http.test_watch import segment


class FakeClient:
    """A pool whose hosts say `news` by name; None of one that is silent. `asked` are (host, edition)."""

    def __init__(self, name: str, **hosts: HostNews | None) -> None:
        self.config = SimpleNamespace(name=name, model=SimpleNamespace(name="m"))
        self.hosts = hosts
        self.wait_s: float | None = 2.0
        self.asked: list[tuple[str, int]] = []

    async def members(self) -> tuple[str, ...]:
        return tuple(self.hosts)

    async def news(self, host: str, since: int) -> tuple[HostNews, float | None] | None:
        self.asked.append((host, since))
        answer = self.hosts[host]
        return None if answer is None else (answer, self.wait_s)


def nobody() -> int:
    """How many requests the router has refused."""
    return 0


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "LOOK_S", 0.005)
    monkeypatch.setattr(looks.time, "time", lambda: 100.0)


def do(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 10))


async def silence(looking: Any) -> None:
    """Nothing is told for some looks; `looking` is closed."""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(looking), 0.1)


def test_only_what_changed_is_told_and_only_news_are_asked_for() -> None:
    async def scene() -> None:
        one, two = FakeClient("one", a=news(edition=3), b=news(edition=4)), FakeClient("two", c=news())
        looking = watch([one, two], nobody)  # type: ignore[list-item]
        first: FleetNews = await anext(looking)
        assert first.complete and first.pools["one"].hosts.keys() == {"a", "b"}
        assert first.pools["two"].predicted_wait_s == 2.0
        one.hosts["b"] = news(100.2, edition=5, waiting=1)
        one.hosts["a"] = news(100.2, edition=3)  # only its clock has gone on
        second = await anext(looking)
        assert not second.complete and second.pools["one"].hosts.keys() == {"b"}
        assert not second.pools["two"].hosts
        assert one.asked[:4] == [("a", 0), ("b", 0), ("a", 3), ("b", 4)]
        await silence(looking)

    do(scene())


def test_times_are_on_one_clock_whatever_a_hosts_own_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        past = [segment(1, ended_at=95.0), segment(2)]
        out = [OutageStatus(worker=0, out_at=90.0, died=True)]
        late, near = news(100.0, *past, outages=out), news(1000.3, segment(1, ended_at=95.0))
        looking = watch([FakeClient("one", late=late, near=near)], nobody)  # type: ignore[list-item]
        told = (await anext(looking)).pools["one"].hosts
        assert told["near"] == near
        first, second = told["late"].segments
        assert told["late"].now == 1000.0 and first.ended_at == 995.0 and first.began_at == 901.0
        assert second.ended_at is None and told["late"].outages[0].out_at == 990.0

    monkeypatch.setattr(looks.time, "time", lambda: 1000.0)
    do(scene())


def test_what_the_router_refuses_is_told_in_all_and_is_news() -> None:
    async def scene() -> None:
        refused = [3]
        looking = watch([FakeClient("one", a=news())], lambda: refused[0])  # type: ignore[list-item]
        assert (await anext(looking)).refused == 3
        refused[0] = 4
        told = await anext(looking)
        assert told.refused == 4 and not told.pools["one"].hosts
        await silence(looking)

    do(scene())


def test_a_wait_that_changes_is_news() -> None:
    async def scene() -> None:
        pool = FakeClient("one", a=news())
        looking = watch([pool], nobody)  # type: ignore[list-item]
        await anext(looking)
        pool.wait_s = 7.0
        assert (await anext(looking)).pools["one"].predicted_wait_s == 7.0
        pool.wait_s = None
        assert (await anext(looking)).pools["one"].predicted_wait_s is None

    do(scene())


def test_hosts_come_go_and_fall_silent() -> None:
    async def scene() -> None:
        pool = FakeClient("one", a=news(edition=3), b=news())
        looking = watch([pool], nobody)  # type: ignore[list-item]
        await anext(looking)
        pool.hosts["a"] = None
        silent = await anext(looking)
        assert silent.pools["one"].silent == ("a",) and not silent.pools["one"].hosts
        pool.hosts["a"] = news(edition=3)
        again = await anext(looking)
        assert again.pools["one"].hosts.keys() == {"a"} and pool.asked[-2] == ("a", 0)
        del pool.hosts["b"]
        assert (await anext(looking)).pools["one"].gone == ("b",)
        pool.hosts.clear()
        empty = await anext(looking)
        assert empty.pools["one"].gone == ("a",) and empty.pools["one"].predicted_wait_s is None
        pool.hosts["d"] = news()
        assert (await anext(looking)).pools["one"].hosts.keys() == {"d"}
        await silence(looking)

    do(scene())


def test_however_many_hosts_there_are_a_look_asks_so_many_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        pool = FakeClient("one", **{f"h{n}": news() for n in range(7)})
        looking = watch([pool, FakeClient("two", x=news())], nobody)  # type: ignore[list-item]
        told = [set((await anext(looking)).pools["one"].hosts) for _ in range(3)]
        assert [len(hosts) for hosts in told] == [3, 3, 1] and set().union(*told) == pool.hosts.keys()

    monkeypatch.setattr(looks, "AT_ONCE", 3)
    do(scene())
