"""The life of a request on its host: states, and what it goes on from."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from PIL import Image

from distriray.errors import GenerationCancelled
from distriray.events import Preview, Regrouped, Started
from distriray.gang.admission import Admitted
from distriray.gang.job import TRANSITIONS, Job, JobState
from distriray.gang.messages import Progress, RankResult, SegmentEnd, WorkerId
from distriray.gang.segment_result import SegmentResult

from .fleet import ask

A, B, C = WorkerId(0, 0), WorkerId(1, 1), WorkerId(1, 2)


def do(scene: Callable[[Job], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        await scene(
            Job(Admitted(ask(), max_gang=4, num_steps=6, guided=True, fresh=True, warmup_steps=1), number=1)
        )

    asyncio.run(run())


def left(step: int, *workers: WorkerId, end: SegmentEnd = SegmentEnd.YIELDED) -> SegmentResult:
    return SegmentResult({worker: RankResult(end, step, formed_at=1.0, left_at=1.0) for worker in workers})


def back(job: Job, result: SegmentResult) -> None:
    job.come_back(result, result.held)


def test_a_request_goes_on_from_the_last_step_that_anybody_holds() -> None:
    async def scene(job: Job) -> None:
        job.start((0, 1), 1)
        back(job, left(3, A, B))
        assert job.state is JobState.WAITING and job.step == 3 and job.holders == {A, B}
        job.start((1,), 2)
        back(job, left(5, B))
        assert job.step == 5 and job.holders == {B}
        job.lose(B)
        assert job.step == 3 and job.holders == {A} and job.prepared
        job.lose(A)
        assert job.step == 0 and not job.holders and not job.prepared

    do(scene)


def test_another_process_in_the_same_place_is_no_holder() -> None:
    async def scene(job: Job) -> None:
        job.start((0, 1), 1)
        back(job, left(3, A, B))
        assert C not in job.holders
        job.lose(C)
        assert job.holders == {A, B}

    do(scene)


def test_a_gang_that_brings_nothing_back_takes_nothing_away() -> None:
    async def scene(job: Job) -> None:
        job.start((0,), 1)
        back(job, left(4, A))
        job.start((1,), 2)
        job.break_off()
        back(job, SegmentResult({}, lost=(B,)))
        assert job.step == 4 and job.holders == {A}

    do(scene)


def test_the_times_of_a_result_are_those_of_all_its_segments_by_their_first_rank() -> None:
    def rank(end: SegmentEnd, step: int, **fields: Any) -> RankResult:
        return RankResult(end, step, formed_at=1.0, left_at=1.0, **fields)

    async def scene(job: Job) -> None:
        job.start((0, 1), 1)
        first = rank(SegmentEnd.YIELDED, 2, adapters_s=0.5, prepare_s=1.0, fresh_s=(4.0,), stale_s=(2.0,))
        second = rank(SegmentEnd.YIELDED, 2, adapters_s=64.0, prepare_s=64.0, fresh_s=(64.0,))
        back(job, SegmentResult({A: first, B: second}))
        job.start((0,), 2)
        job.progress(Progress(6, 6, False))
        last = rank(
            SegmentEnd.DONE,
            6,
            prepare_s=8.0,
            fresh_s=(16.0,),
            decode_s=32.0,
            images=[Image.new("RGB", (8, 8))],
        )
        back(job, SegmentResult({A: last}))
        times = job.result("m", last).timings
        assert (times.adapters_s, times.prepare_s, times.denoise_s, times.decode_s) == (0.5, 9.0, 22.0, 32.0)
        assert 0.0 <= times.queued_s <= times.total_s < 60.0

    do(scene)


def test_a_preview_is_told_once_whether_it_came_by_itself_or_with_what_a_gang_brought_back() -> None:
    async def scene(job: Job) -> None:
        picture = Image.new("RGB", (8, 8))
        job.start((0,), 1)
        job.progress(Progress(2, 6, False, previews=((2, picture),)))
        result = RankResult(
            SegmentEnd.YIELDED, 4, formed_at=1.0, left_at=1.0, previews=((2, picture), (4, picture))
        )
        back(job, SegmentResult({A: result}))
        told = [job.events.get_nowait() for _ in range(job.events.qsize())]
        assert [(each.step, each.index) for each in told if isinstance(each, Preview)] == [(2, 0), (4, 1)]

    do(scene)


def test_a_death_elsewhere_does_not_set_a_request_back_that_is_being_drawn() -> None:
    async def scene(job: Job) -> None:
        job.start((0, 1), 1)
        back(job, left(3, A, B))
        job.start((1,), 2)
        job.progress(Progress(4, 6, False))
        job.lose(A)
        assert job.step == 4 and job.state is JobState.RUNNING

    do(scene)


def test_it_decodes_once_its_steps_are_done_and_yields_no_more() -> None:
    async def scene(job: Job) -> None:
        job.start((0,), 1)
        job.progress(Progress(6, 6, False))
        assert job.decoding and job.view().pinned and not job.yield_()

    do(scene)


def test_a_gang_that_takes_up_what_has_no_steps_left_decodes() -> None:
    async def scene(job: Job) -> None:
        job.start((0, 1), 1)
        job.progress(Progress(6, 6, False))
        job.break_off()
        back(job, left(6, B, end=SegmentEnd.BROKEN))
        job.start((1,), 2)
        assert job.decoding and job.view().pinned and not job.yield_()

    do(scene)


def test_it_is_told_to_yield_once_and_not_when_it_is_cancelled() -> None:
    async def scene(job: Job) -> None:
        job.start((0,), 1)
        assert job.yield_() and not job.yield_()
        back(job, left(2, A))
        job.start((0,), 2)
        assert job.cancel() and not job.cancel() and not job.yield_()

    do(scene)


def test_a_stream_hears_of_the_first_gang_and_then_of_others() -> None:
    async def scene(job: Job) -> None:
        job.start((0,), 1)
        back(job, left(2, A))
        job.start((0, 1), 2)
        told = [job.events.get_nowait() for _ in range(job.events.qsize())]
        name = job.request.id
        assert told == [Started(name, (0,)), Regrouped(name, (0, 1), 2)]

    do(scene)


def test_a_stream_hears_once_that_its_request_is_started_though_nothing_comes_of_the_first_gang() -> None:
    async def scene(job: Job) -> None:
        job.start((0,), 1)
        job.break_off()
        back(job, SegmentResult({}, lost=(A,)))
        job.start((1,), 2)
        told = [job.events.get_nowait() for _ in range(job.events.qsize())]
        name = job.request.id
        assert told == [Started(name, (0,)), Regrouped(name, (1,), 0)]

    do(scene)


VERBS: dict[JobState, Callable[[Job], object]] = {
    JobState.WAITING: lambda job: back(job, SegmentResult({})),
    JobState.RUNNING: lambda job: job.start((0,), 1),
    JobState.BREAKING: lambda job: job.break_off(),
    JobState.ENDED: lambda job: job.end(GenerationCancelled("it was")),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("state", JobState)
def test_no_verb_changes_a_state_that_it_may_not_change(state: JobState, verb: JobState) -> None:
    async def scene(job: Job) -> None:
        job.state = state
        if verb in TRANSITIONS[state] or state is verb is JobState.BREAKING:
            VERBS[verb](job)
            assert job.state is verb
            return
        with pytest.raises(RuntimeError, match=f"is {state}"):
            VERBS[verb](job)
        assert job.state is state

    do(scene)
