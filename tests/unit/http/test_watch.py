"""GET /v1/fleet/events: one look for all who watch, everything first, and an end."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

import httpx
import pytest

from deployments.http import HttpConfig, build_http, watch
from deployments.http.errors import Refusal
from deployments.http.watch import BEHIND, Watch, merged
from distriray.service import FleetNews, PoolNews
from distriray.status import HostNews, OutageStatus, SegmentStatus
from tests.unit.conftest import serving
from tests.unit.http.fake import FakeService


def host(now: float = 100.0, *segments: SegmentStatus, **fields: Any) -> HostNews:
    told: dict[str, Any] = {
        "edition": 1, "now": now, "device": "cpu", "workers": 2, "waiting": 0, "max_queue": 8,
        "backlog_s": 0.0, "running": {}, "outcomes": {}, "segments": list(segments), "outages": [], **fields,
    }  # fmt: skip
    return HostNews.model_validate(told)


def segment(serial: int, ended_at: float | None = None) -> SegmentStatus:
    end = None if ended_at is None else "finished"
    return SegmentStatus(
        serial=serial, request="r", workers=(0,), first_step=0, began_at=1.0, ended_at=ended_at, end=end
    )


def fleet(complete: bool = False, gone: tuple[str, ...] = (), **hosts: HostNews) -> FleetNews:
    pool = PoolNews(model="m", predicted_wait_s=0.5, hosts=hosts, gone=gone)
    return FleetNews(now=7.0, complete=complete, pools={"pool": pool})


def frames(url: str, until: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    with httpx.stream("GET", f"{url}/v1/fleet/events", timeout=20) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data:"):
                found.append(json.loads(line[5:]))
                if len(found) == until:
                    break
    return found


class Endless(FakeService):
    """Tells a number each time it is let to; `begun` and `over` count looks."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = self.over = 0
        self.go = asyncio.Semaphore(0)

    async def watch(self) -> AsyncGenerator[FleetNews, None]:
        self.begun += 1
        try:
            yield fleet(True, a=host(0.0))
            count = 0
            while True:
                await self.go.acquire()
                count += 1
                yield fleet(a=host(float(count), segment(count)))
        finally:
            self.over += 1


def test_news_have_whatever_the_document_says_that_they_have() -> None:
    """Also of a pool without a host, of which nobody knows how long it takes to wait."""
    schemas = build_http(FakeService(), HttpConfig()).openapi()["components"]["schemas"]
    news = FleetNews(now=7.0, pools={"pool": PoolNews(model="m", predicted_wait_s=None)})
    with serving(FakeService(news=[news])) as url:
        (told,) = frames(url, 1)
    assert told.keys() >= set(schemas["FleetNews"]["required"])
    assert told["pools"]["pool"].keys() >= set(schemas["PoolNews"]["required"])


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "EACH_S", 0.0)


def do(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 10))


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def told(watcher: watch.Watcher) -> list[dict[str, Any] | None]:
    found: list[dict[str, Any] | None] = []
    while watcher._queue.qsize():
        frame = watcher._queue.get_nowait()
        found.append(None if frame is None else json.loads(frame.decode().split("data: ")[1]))
    return found


def test_news_come_as_server_sent_events_and_the_stream_ends_with_them() -> None:
    news = [fleet(True, a=host(1.0, segment(1))), fleet(a=host(2.0, segment(1, ended_at=2.0)))]
    with serving(FakeService(news=news)) as url:
        first, second = frames(url, 9)
    assert first["complete"] and not second["complete"]
    ended = second["pools"]["pool"]["hosts"]["a"]["segments"][0]
    assert ended["end"] == "finished" and ended["serial"] == 1 and ended["workers"] == [0]
    assert "end" not in first["pools"]["pool"]["hosts"]["a"]["segments"][0]


@pytest.mark.usefixtures("at_once")
def test_all_who_watch_share_one_look_which_ends_with_the_last_of_them() -> None:
    async def scene() -> None:
        service = Endless()
        watching = Watch(service)
        first, second = watching.join(), watching.join()
        await settle()
        service.go.release()
        await settle()
        third = watching.join()
        assert service.begun == 1
        one, other = told(first), told(second)
        assert one == other and [news["complete"] for news in one if news] == [True, False]
        (everything,) = told(third)
        assert everything is not None and everything["complete"] and everything["now"] > 7.0
        assert [s["serial"] for s in everything["pools"]["pool"]["hosts"]["a"]["segments"]] == [1]
        for watcher in (first, second):
            await watcher.aclose()
        await settle()
        assert service.over == 0
        await third.aclose()
        await settle()
        assert service.over == 1
        watching.join()
        await settle()
        assert service.begun == 2

    do(scene())


@pytest.mark.usefixtures("at_once")
def test_who_comes_as_the_last_one_leaves_goes_on_to_watch() -> None:
    async def scene() -> None:
        service = Endless()
        watching = Watch(service)
        first = watching.join()
        await settle()
        await first.aclose()
        second = watching.join()  # the look of the first has not ended yet
        await settle()
        assert service.over == 1 and service.begun == 2
        assert [news and news["complete"] for news in told(second)] == [True]

    do(scene())


@pytest.mark.usefixtures("at_once")
def test_who_does_not_keep_up_is_sent_away_and_holds_nobody_up() -> None:
    async def scene() -> None:
        service = Endless()
        watching = Watch(service)
        slow, quick = watching.join(), watching.join()
        heard = 0
        for _ in range(2 * BEHIND):
            service.go.release()
            await settle()
            heard += len(told(quick))
        assert heard == 2 * BEHIND + 1
        seen = told(slow)
        assert len(seen) == BEHIND + 1 and seen[-1] is None

    do(scene())


def test_the_more_watch_the_less_often_is_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        watching = Watch(FakeService(news=[fleet(True), fleet(), fleet()]))
        for _ in range(3):
            watching.join()
        for _ in range(5):
            await settle()
        assert slept == [3 * 0.25] * 3

    slept: list[float] = []
    own = asyncio.sleep

    async def sleep(seconds: float) -> None:
        if seconds:
            slept.append(round(seconds, 3))
        await own(0)

    monkeypatch.setattr(watch, "EACH_S", 0.25)
    monkeypatch.setattr(watch.asyncio, "sleep", sleep)
    do(scene())


@pytest.mark.usefixtures("at_once")
def test_a_look_that_fails_ends_the_streams_and_the_next_looks_again() -> None:
    class Broken(FakeService):
        async def watch(self) -> AsyncGenerator[FleetNews, None]:
            yield fleet(True)
            raise KeyError("a bug")

    async def scene() -> None:
        watching = Watch(Broken())
        for _ in range(2):
            watcher = watching.join()
            await settle()
            assert [news is None for news in told(watcher)] == [False, True]
            await watcher.aclose()

    do(scene())


def test_so_many_may_watch_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        watching = Watch(Endless())
        first, _ = watching.join(), watching.join()
        with pytest.raises(Refusal, match="2 watch already") as refused:
            watching.join()
        assert refused.value.status == 429 and refused.value.headers == {"Retry-After": "10"}
        await first.aclose()
        watching.join()

    monkeypatch.setattr(watch, "MAX_WATCHERS", 2)
    do(scene())


def test_a_stream_has_an_end_and_is_kept_alive_until_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "STREAM_S", 0.5)
    monkeypatch.setattr(watch, "KEEP_ALIVE_S", 0.15)
    with serving(Endless()) as url:
        text = httpx.get(f"{url}/v1/fleet/events", timeout=20).text
    assert text.startswith("event: fleet.news") and 1 <= text.count("\n:\n") <= 3


def test_a_client_that_leaves_watches_no_more() -> None:
    service = Endless()
    with serving(service) as url:
        assert frames(url, 1)[0]["complete"]
        for _ in range(200):
            if service.over:
                break
            threading.Event().wait(0.02)
        assert service.over == 1


def test_head_does_not_begin_to_watch() -> None:
    service = Endless()
    with serving(service) as url:
        head = httpx.head(f"{url}/v1/fleet/events", timeout=5)
    assert head.status_code == 200 and head.headers["content-type"].startswith("text/event-stream")
    assert service.begun == 0


def test_watching_needs_a_key_where_there_are_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEYS", "secret")
    service = Endless()
    with serving(service, HttpConfig(keys_env="SOME_KEYS")) as url:
        assert httpx.get(f"{url}/v1/fleet/events").status_code == 401
    assert service.begun == 0


def test_what_ended_long_ago_is_forgotten_and_what_goes_on_is_not() -> None:
    known = fleet(True, a=host(0.0, segment(1, ended_at=1.0), segment(2), segment(3)), b=host())
    old = OutageStatus(worker=0, out_at=0.0, back_at=1.0, died=True)
    open_ = OutageStatus(worker=1, out_at=0.0, died=True)
    new = fleet(gone=("b",), a=host(95.0, segment(3, ended_at=90.0), outages=[old, open_]))
    told = merged(known, new).pools["pool"]
    assert [one.serial for one in told.hosts["a"].segments] == [3, 2] and told.hosts.keys() == {"a"}
    assert told.hosts["a"].outages == [open_] and told.hosts["a"].now == 95.0
    assert told.hosts["a"].segments[0].ended_at == 90.0


def test_what_is_told_at_once_is_bounded_however_many_hosts_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "TOLD_AT_ONCE", 40)
    hosts = {
        f"h{n}": host(5.0, segment(0), *(segment(s, ended_at=s) for s in range(1, 30))) for n in range(4)
    }
    known = merged(fleet(True), fleet(**hosts))
    assert [one.serial for one in known.pools["pool"].hosts["h0"].segments] == [*range(20, 30), 0]
    many = merged(known, fleet(**{f"g{n}": host(5.0, segment(1, ended_at=1.0)) for n in range(100)}))
    assert sum(len(one.segments) for one in many.pools["pool"].hosts.values()) <= 40 + 4


def test_a_host_is_silent_until_it_answers_again() -> None:
    silent = FleetNews(now=7.0, pools={"pool": PoolNews(model="m", predicted_wait_s=None, silent=("a", "b"))})
    known = merged(fleet(True, a=host(), b=host()), silent)
    assert known.pools["pool"].silent == ("a", "b")
    assert merged(known, fleet(a=host(5.0))).pools["pool"].silent == ("b",)
    assert merged(known, fleet(gone=("b",))).pools["pool"].silent == ("a",)
