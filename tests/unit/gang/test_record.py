"""What a host remembers for those who watch: each segment, how it ended, and when workers were out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import pytest
from PIL import Image

from distriray.errors import InvalidRequest
from distriray.gang import record
from distriray.gang.messages import RankResult, SegmentEnd, WorkerId
from distriray.gang.record import Record
from distriray.gang.segment_result import SegmentResult
from distriray.gang.status import news_of
from distriray.results import Segment
from distriray.status import HostNews, SegmentStatus

from .fleet import LONG, FakeHost, until


def do(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 20))


def news(host: FakeHost, since: int = 0) -> HostNews:
    return news_of(host.dispatcher, "cpu", since)


def test_a_segment_is_told_when_it_begins_and_when_it_ends() -> None:
    async def scene() -> None:
        async with FakeHost(2, limits={"max_steps": LONG}) as host:
            job = host.accept(id="one", gang_size=2, num_inference_steps=LONG)
            await until(lambda: job.step > 2)
            running = news(host)
            (begun,) = running.segments
            assert (begun.request, begun.workers, begun.first_step, begun.end) == ("one", (0, 1), 0, None)
            assert running.running == {"one": (job.step, LONG)} and running.waiting == 0
            assert abs(begun.began_at - time.time()) < 20 and running.workers == 2
            host.dispatcher.cancel(job)
            await until(lambda: job.ended.done())
            later = news(host, running.edition)
            (over,) = later.segments
            assert over.serial == begun.serial and over.end == "cancelled" and over.began_at == begun.began_at
            assert over.ended_at is not None and over.last_step == job.step and over.exchange == "auto"
            assert later.running == {} and later.outcomes == {"cancelled": 1}
            assert news(host, later.edition).segments == []

    do(scene())


def test_a_finished_segment_says_how_its_steps_were() -> None:
    async def scene() -> None:
        async with FakeHost(1) as host:
            await host.accept(id="one").ended
            await host.whole()
            (over,) = news(host).segments
            assert over.end == "finished" and over.last_step == 6 and over.step_s == pytest.approx(0.001)

    do(scene())


def test_what_was_refused_at_its_first_step_failed_and_did_nothing() -> None:
    async def scene() -> None:
        async with FakeHost(1) as host:
            host.fleet.at(0).refuses = InvalidRequest("no such thing", "prompt")
            job = host.accept()
            with pytest.raises(InvalidRequest):
                await job.ended
            await host.whole()
            (over,) = news(host).segments
            assert over.end == "failed" and over.last_step == 0 and over.exchange is None

    do(scene())


def test_a_death_is_a_broken_segment_an_outage_and_another_segment() -> None:
    async def scene() -> None:
        async with FakeHost(2, limits={"max_steps": LONG}) as host:
            job = host.accept(gang_size=1, num_inference_steps=LONG)
            await until(lambda: job.workers is not None and job.step > 2)
            (index,) = job.workers or ()
            host.fleet.at(index).die()
            await until(lambda: len(host.dispatcher.record.segments(0)) == 2)
            told = news(host)
            broken, goes_on = sorted(told.segments, key=lambda segment: segment.serial)
            assert broken.end == "broken" and goes_on.end is None and goes_on.request == broken.request
            (outage,) = told.outages
            assert outage.worker == index and outage.died
            await until(lambda: host.dispatcher.record.outages(0)[0].back_at is not None)
            host.dispatcher.cancel(job)
            await until(lambda: job.ended.done())

    do(scene())


def test_an_error_of_the_hosts_own_is_a_failed_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with FakeHost(1) as host:
            monkeypatch.setattr(host.dispatcher.metrics, "segment", lambda *_: 1 / 0)
            assert (await host.accept().ended).images  # drawn before it
            await host.whole()
            assert [segment.end for segment in news(host).segments] == ["finished"]
            monkeypatch.setattr("distriray.gang.segments.RunningSegment.come_back", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await host.accept().ended
            await host.whole()
            assert [segment.end for segment in news(host).segments] == ["finished", "failed"]

    do(scene())


def test_what_waits_is_counted() -> None:
    async def scene() -> None:
        async with FakeHost(1, limits={"max_steps": LONG}) as host:
            jobs = [host.accept(num_inference_steps=LONG) for _ in range(3)]
            await until(lambda: jobs[0].step > 0)
            assert news(host).waiting == 2 and news(host).max_queue == host.config.max_queue

    do(scene())


@pytest.mark.parametrize(
    ("ends", "lost", "word"),
    [
        ((SegmentEnd.DONE, SegmentEnd.DONE), (), "finished"),
        ((SegmentEnd.YIELDED, SegmentEnd.YIELDED), (), "yielded"),
        ((SegmentEnd.CANCELLED, SegmentEnd.CANCELLED), (), "cancelled"),
        ((SegmentEnd.REFUSED, SegmentEnd.NOT_BEGUN), (), "failed"),
        ((SegmentEnd.BROKEN,), (WorkerId(1, 1),), "broken"),
        ((SegmentEnd.DONE,), (), "broken"),
        ((), (WorkerId(0, 0), WorkerId(1, 1)), "broken"),
    ],
)
def test_an_end_has_one_word(ends: tuple[SegmentEnd, ...], lost: tuple[WorkerId, ...], word: str) -> None:
    def rank(index: int, end: SegmentEnd) -> RankResult:
        finished = end is SegmentEnd.DONE and word == "finished" and index == 0
        return RankResult(
            end, 1,
            images=[Image.new("RGB", (8, 8))] if finished else None,
            error=InvalidRequest("no", "prompt") if end is SegmentEnd.REFUSED else None,
        )  # fmt: skip

    result = SegmentResult({WorkerId(n, n): rank(n, end) for n, end in enumerate(ends)}, lost)
    if word == "broken" and not lost:
        result = SegmentResult({**result.ranks, WorkerId(1, 1): RankResult(SegmentEnd.NOT_BEGUN, 1)})
    assert result.end == word


def test_what_ranks_waited_is_told_as_their_mean() -> None:
    past = Record()
    past.began(1, "one", (0, 1), 2)
    waited = {
        WorkerId(n, n): RankResult(SegmentEnd.YIELDED, 5, waited=share) for n, share in ((0, 0.1), (1, 0.3))
    }
    segment = Segment(
        workers=(0, 1), first_step=2, last_step=5, seconds=1.0, sent_at=0, formed_at=0, left_at=1,
        fresh_step_s=0.5, stale_step_s=0.25, exchange="displaced",
    )  # fmt: skip
    past.ended(1, SegmentResult(waited), segment)
    (told,) = past.segments(0)
    assert told.waited == pytest.approx(0.2) and (told.step_s, told.exchange) == (0.25, "displaced")
    assert (told.first_step, told.last_step, told.end) == (2, 5, "yielded")


def test_memory_is_bounded_and_what_runs_is_never_forgotten() -> None:
    past = Record()
    past.began(0, "long", (0,), 0)
    for serial in range(1, 3 * record.KEPT):
        past.began(serial, "short", (1,), 0)
        past.ended(serial, None, None)
        past.out(1, died=True)
        past.back(1)
    told: list[SegmentStatus] = past.segments(0)
    assert len(told) == record.KEPT + 1 and len(past.outages(0)) == record.KEPT
    assert [segment.serial for segment in told if segment.end is None] == [0]
    newest = past.segments(past.edition - 2)
    assert newest == [] and [segment.serial for segment in past.segments(past.edition - 3)] == [serial]


def test_a_worker_that_dies_while_it_is_out_is_out_since_before() -> None:
    past = Record()
    past.out(0, died=False)
    (first,) = past.outages(0)
    past.out(0, died=True)
    (second,) = past.outages(0)
    assert second.died and not first.died and second.out_at == first.out_at
    past.back(0)
    past.back(0)
    (third,) = past.outages(0)
    assert third.back_at is not None and third.died
