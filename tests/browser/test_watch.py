"""The view to watch, in a browser, before a service that tells of a fleet."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from deployments.http import watch
from distriray.service import FleetNews, PoolNews
from distriray.status import HostNews, OutageStatus, SegmentStatus
from tests.unit.http.fake import FakeService
from tests.unit.http.test_watch import host

from .conftest import Open, Serve
from .hands import wait_for_count, wait_for_text

pytestmark = pytest.mark.browser


def segment(serial: int, request: str, workers: tuple[int, ...], ago: float, **fields: Any) -> SegmentStatus:
    began = {"serial": serial, "request": request, "workers": workers, "began_at": time.time() - ago}
    return SegmentStatus.model_validate({"first_step": 0, **began, **fields})


def over(until: float, end: str, last_step: int = 9, **fields: Any) -> dict[str, Any]:
    return {"ended_at": time.time() - until, "end": end, "last_step": last_step, "exchange": "sync", **fields}


def fleet(complete: bool = False, gone: tuple[str, ...] = (), **hosts: HostNews) -> FleetNews:
    pool = PoolNews(model="m", predicted_wait_s=2.5, hosts=hosts, gone=gone)
    return FleetNews(now=time.time(), complete=complete, pools={"pool": pool})


class Told(FakeService):
    """A fleet that is told of as a test says."""

    def __init__(self, *news: FleetNews) -> None:
        super().__init__(news=list(news))
        self.looks = 0

    async def watch(self) -> AsyncGenerator[FleetNews, None]:
        self.looks += 1
        try:
            told = 0
            while True:
                while told < len(self.news):
                    yield self.news[told]
                    told += 1
                await watch.asyncio.sleep(0.02)
        finally:
            self.looks -= 1


def story() -> HostNews:
    """A regrouping, a death with its repair, a cancellation, and who works now."""
    segments = [
        segment(1, "aaaa", (0, 1, 2, 3), 50, **over(40, "yielded", step_s=0.1, waited=0.2)),
        segment(2, "aaaa", (0, 1), 40, first_step=9, **over(30, "finished", 25, step_s=0.1, waited=0.1)),
        segment(3, "bbbb", (2, 3), 30, **over(20, "broken", 11)),
        segment(4, "bbbb", (0, 1), 19, first_step=10, **over(12, "finished", 25, step_s=0.2, waited=0.05)),
        segment(5, "cccc", (2,), 11, **over(8, "cancelled", 7)),
        segment(6, "dddd", (0, 1), 5),
    ]
    outages = [
        OutageStatus(worker=3, out_at=time.time() - 20, back_at=time.time() - 9, died=True),
        OutageStatus(worker=2, out_at=time.time() - 2, died=True),
    ]
    now: dict[str, Any] = {
        "running": {"dddd": (5, 25)},
        "waiting": 3,
        "outcomes": {"finished": 7, "failed": 1, "refused": 2},
    }
    return host(time.time(), *segments, workers=4, outages=outages, **now)


def test_the_fleet_is_told_in_cells_bars_marks_numbers_and_words(open_page: Open, serve: Serve) -> None:
    told_first = fleet(True, a1=story()).model_copy(update={"refused": 5})
    url = serve(Told(told_first))
    page = open_page(f"{url}#watch")
    wait_for_text(page, ".live", "Live")
    assert page.locator(".worker").count() == 4 and page.locator(".worker.busy").count() == 2
    labels = [cell.get_attribute("aria-label") for cell in page.locator(".worker").all()]
    assert labels[0] == "Worker 0: works for dddd" and labels[2:] == [
        "Worker 2: being replaced", "Worker 3: free"
    ]  # fmt: skip
    assert page.locator(".segment").count() == 6 and page.locator(".segment rect").count() == 4 + 7 + 2
    assert page.locator(".outage.dead").count() == 2
    for kind in ("regrouped", "repaired", "cancelled"):
        assert page.locator(f".timeline .mark.{kind}").count() == 1
    tiles = page.inner_text(".tiles")
    for told in ("2 of 4", "1 being replaced", "3 waiting", "2.5 s", "7", "1 failed, 7 refused"):
        assert told in tiles
    assert "5 of 25" in page.inner_text(".requests")
    rows = [row.split("\t") for row in page.inner_text("tbody").splitlines()]
    assert rows == [["sync", "51", "138 ms", "10 %"], ["alone", "7", "–", "–"]]
    said = page.inner_text("[role=log]")
    for told in (
        "workers 0 and 1 went on from step 9, after workers 0, 1, 2 and 3",
        "its gang of 2 broke at step 11",
        "Worker 3 of host a1 died",
        "repaired, workers 0 and 1 went on from step 10",
        "Worker 3 of host a1 is back after 11 s",
        "cccc: cancelled at step 7",
    ):
        assert told in said
    assert "worker 2 is dead" in (page.get_attribute(".timeline svg", "aria-label") or "")


def test_bars_are_where_their_times_are_and_grow(open_page: Open, serve: Serve) -> None:
    url = serve(Told(fleet(True, a1=story())))
    page = open_page(f"{url}#watch")
    wait_for_count(page, ".segment", 6)
    timeline = page.locator(".timeline svg").bounding_box()
    ended = page.locator("[data-end=cancelled] rect").bounding_box()
    running = page.locator("[data-request=dddd] rect").first.bounding_box()
    assert timeline and ended and running
    second = timeline["width"] / 60
    right = timeline["x"] + timeline["width"]
    assert abs(running["x"] + running["width"] - right) < second
    assert abs(ended["width"] - 3 * second) < second
    page.wait_for_timeout(1500)
    later, grown = (
        page.locator(f"{what} rect").first.bounding_box()
        for what in ("[data-end=cancelled]", "[data-request=dddd]")
    )
    assert later and grown and later["x"] < ended["x"] - second and abs(later["width"] - ended["width"]) < 1
    assert grown["width"] > running["width"] + second


def test_hosts_come_change_fall_silent_and_go(open_page: Open, serve: Serve) -> None:
    service = Told(fleet(True))
    url = serve(service)
    page = open_page(f"{url}#watch")
    wait_for_text(page, ".live", "Live")
    assert page.locator(".host").count() == 0
    service.news.append(fleet(a1=host(time.time()), b2=host(time.time())))
    wait_for_count(page, ".host", 2)
    silent = PoolNews(model="m", predicted_wait_s=None, silent=("a1",))
    service.news.append(FleetNews(now=time.time(), pools={"pool": silent}))
    wait_for_text(page, ".host.silent .about", "does not answer")
    service.news.append(fleet(a1=host(time.time(), segment(1, "eeee", (0,), 1.0))))
    wait_for_count(page, ".worker.busy", 1)
    assert page.locator(".host.silent").count() == 0
    service.news.append(fleet(gone=("a1",)))
    wait_for_count(page, ".host", 1)


def test_nobody_is_asked_while_nobody_looks(open_page: Open, serve: Serve) -> None:
    service = Told(fleet(True, a1=story()))
    url = serve(service)
    page = open_page(url)
    page.wait_for_selector("#submit:enabled")
    assert service.looks == 0
    page.click("#to-watch")
    wait_for_count(page, ".segment", 6)
    assert service.looks == 1
    page.click("#to-draw")
    for _ in range(100):
        if not service.looks:
            break
        page.wait_for_timeout(30)
    assert service.looks == 0
    page.click("#to-watch")
    wait_for_text(page, ".live", "Live")
    wait_for_count(page, ".segment", 6)


def test_a_stream_that_ends_is_asked_for_again_and_starts_over(
    open_page: Open, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "STREAM_S", 0.3)
    service = Told(fleet(True, a1=story()))
    url = serve(service)
    page = open_page(f"{url}#watch")
    with page.expect_request("**/v1/fleet/events"):
        pass
    with page.expect_request("**/v1/fleet/events"):
        pass
    wait_for_text(page, ".live", "Live")
    assert page.locator("[role=log] li").count() == 6 + 1


def test_a_service_that_is_gone_is_said_and_found_again(open_page: Open, serve: Serve) -> None:
    url = serve(Told(fleet(True, a1=story())))
    page = open_page(f"{url}#watch", allowed=("Failed to load",))
    wait_for_text(page, ".live", "Live")
    page.route("**/v1/fleet/events", lambda route: route.abort())
    page.click("#to-draw")
    page.click("#to-watch")
    wait_for_text(page, ".live", "cannot be reached")
    page.unroute("**/v1/fleet/events")
    wait_for_text(page, ".live", "Live")


def test_a_request_of_this_tab_is_called_by_its_prompt(open_page: Open, serve: Serve) -> None:
    service = Told()
    url = serve(service)
    page = open_page(url)
    page.fill("#f-prompt", "a lake of this tab")
    page.click("#submit:enabled")
    page.wait_for_selector(".facts")
    service.news.append(fleet(True, a1=host(time.time(), segment(1, service.asked[0].id, (0,), 2.0))))
    page.click("#to-watch")
    wait_for_count(page, ".worker.busy", 1)
    assert page.get_attribute(".worker.busy", "aria-label") == "Worker 0: works for a lake of this tab"


def test_many_hosts_are_one_line_each(open_page: Open, serve: Serve) -> None:
    hosts = {f"h{number}": host(time.time(), workers=8) for number in range(30)}
    url = serve(Told(fleet(True, **hosts)))
    page = open_page(f"{url}#watch")
    wait_for_count(page, ".host", 30)
    assert page.locator(".host[open]").count() == 12 and page.locator(".few").last.is_visible()
    page.locator(".host summary").last.press("Enter")
    assert page.locator(".host[open]").count() == 13
