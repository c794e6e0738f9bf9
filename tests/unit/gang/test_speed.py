"""What a host learns of its speed from segments."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from PIL import Image

from distriray.config import ParallelConfig
from distriray.gang.job import Job
from distriray.gang.messages import RankResult, SegmentEnd, WorkerId
from distriray.gang.segment_result import SegmentResult
from distriray.gang.speed import Moment, Speed
from distriray.results import Segment
from distriray.routing.latency import Times
from distriray.routing.policy import RequestView
from distriray.routing.profile import Entry, Profile

from .fleet import FakeHost
from .test_dispatcher import do, opened

MEASURED = Entry(gang=2, height=512, width=512, step_s=0.2, prepare_s=0.1, decode_s=0.4)
STEPS = 20


def learnt_of(
    first_step: int = 0,
    last_step: int = STEPS,
    end: SegmentEnd = SegmentEnd.DONE,
    unguided_steps: int = 0,
    lost: tuple[WorkerId, ...] = (),
    peer_s: float = 1.5,
) -> Times:
    """What a host knows once it has seen three segments of ten seconds.

    Of these it prepared for 1.5, loaded adapters for 0.5, made steps and previews for 5 and decoded for 2; in
    what is left, messages went there and back.
    """
    segment = Segment(
        workers=(0, 1), first_step=first_step, last_step=last_step, seconds=10.0, sent_at=99.5,
        formed_at=100.0, left_at=107.0, fresh_step_s=0.3, stale_step_s=0.25,
    )  # fmt: skip
    drawn: dict[str, Any] = {"images": [Image.new("RGB", (8, 8))], "decode_s": 2.0}
    rank = RankResult(
        end, last_step, adapters_s=0.5, prepare_s=1.5, formed_at=100.0, left_at=107.0,
        **drawn if end is SegmentEnd.DONE else {},
    )  # fmt: skip
    peer = RankResult(end, last_step, prepare_s=peer_s, formed_at=100.0, left_at=107.0)
    view = RequestView("r", 512, 512, 1, STEPS, last_step, 0.0, unguided_steps=unguided_steps)
    job = SimpleNamespace(segments=[segment], request=SimpleNamespace(control=()), view=lambda: view)
    speed = Speed(Profile(model="m", device="d", version="1", entries=(MEASURED,)))
    for _ in range(3):
        now = speed.now()
        began = Moment(now.clock_s - 10.0, now.host_s - 10.0)
        speed.learn(cast(Job, job), SegmentResult({WorkerId(0, 0): rank, WorkerId(1, 0): peer}, lost), began)
    return speed.model.times(2, 512, 512, 1)


def test_a_whole_picture_teaches_its_steps_and_what_is_before_and_behind_them() -> None:
    times = learnt_of()
    assert times.step_s == pytest.approx(0.25, rel=0.01)
    assert (times.prepare_s, times.decode_s) == pytest.approx((2.5, 2.0), rel=0.01)


def test_a_gang_prepares_for_as_long_as_its_last_rank() -> None:
    assert learnt_of(peer_s=4.5).prepare_s == pytest.approx(5.0, rel=0.01)


def test_a_part_of_a_picture_teaches_what_it_has() -> None:
    begun = learnt_of(last_step=8, end=SegmentEnd.YIELDED)
    assert begun.prepare_s == pytest.approx(4.5, rel=0.01), "it sent the state, and decoded nothing"
    gone_on = learnt_of(first_step=8)
    assert gone_on.decode_s == pytest.approx(2.0, rel=0.01)
    assert begun.decode_s == pytest.approx(0.5, rel=0.01), "by how much slower steps were than measured"
    assert gone_on.prepare_s == pytest.approx(0.125, rel=0.01), "likewise"


def test_a_gang_that_broke_teaches_only_the_steps_that_it_made() -> None:
    times = learnt_of(last_step=8, end=SegmentEnd.BROKEN, lost=(WorkerId(1, 0),))
    assert times.step_s == pytest.approx(0.25, rel=0.01)
    assert (times.prepare_s, times.decode_s) == pytest.approx((0.125, 0.5), rel=0.01), "as steps are slower"


def test_where_guidance_ends_within_a_segment_its_steps_teach_nothing_and_the_rest_does() -> None:
    times = learnt_of(unguided_steps=6)
    assert times.step_s == 0.2
    assert (times.prepare_s, times.decode_s) == pytest.approx((2.5, 2.0), rel=0.01)


def test_another_way_to_share_steps_is_learnt_of_it_alone() -> None:
    async def scene() -> None:
        async with FakeHost(1, **opened()) as host:
            model, plain = host.dispatcher.speed.model, host.accept(num_inference_steps=8)
            await plain.ended
            known, learnt = model.times(1, *plain.view().shape), model.observations
            for other in ({"exchange": "none"}, {"parallel": ParallelConfig(attention="gather")}):
                asked = host.accept(num_inference_steps=8, **other)
                ((name, added),) = asked.view().besides
                assert name.startswith("parallel ") and added == 0.0, "nothing is known of it"
                await asked.ended
            assert model.observations == learnt + 2 and model.times(1, *plain.view().shape) == known

    do(scene())


def test_warm_up_is_as_long_as_a_request_is_to_have_it_whatever_was_measured() -> None:
    async def scene() -> None:
        async with FakeHost(1, **opened(), parallel=ParallelConfig(exchange="displaced")) as host:
            longer = ParallelConfig(exchange="displaced", warmup_steps=7, max_buffer_bytes=0)
            asked = host.accept(num_inference_steps=8, parallel=longer).view()
            assert (asked.warmup_steps, asked.besides) == (7, ()), "its steps are like others"
            assert host.accept().view().warmup_steps == 4
            times = replace(host.dispatcher.speed.model.times(1, *asked.shape), sync_step_s=10.0)
            assert asked.left_s(times) == times.run_s(0, 8, warmup_steps=7)
            host.dispatcher.config = host.config.model_copy(update={"parallel": longer})
            assert host.accept().view().warmup_steps == 7, "what a live host is changed to counts"

    do(scene())
