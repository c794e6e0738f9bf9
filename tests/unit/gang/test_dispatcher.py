"""Requests on their way through a host whose workers die, hang, fail and refuse."""

from __future__ import annotations

import asyncio
import logging
import pickle
import re
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from ray.util.metrics import Counter, Gauge, Histogram

from distriray.config import PAPER, ParallelConfig
from distriray.denoise.pipelines.terms import Terms
from distriray.errors import (
    GangBroken,
    GenerationCancelled,
    InvalidRequest,
    NotEnoughDevices,
    QueueFull,
    UnsupportedModel,
)
from distriray.events import Repaired
from distriray.gang import segments
from distriray.gang.admission import admit
from distriray.gang.calibrate import calibrate
from distriray.gang.host import Host
from distriray.gang.job import Job
from distriray.gang.messages import (
    Progress,
    RankResult,
    SegmentEnd,
    SegmentOrder,
    StateLost,
    StopSignal,
    WorkerId,
)
from distriray.gang.metrics import HostMetrics, Name
from distriray.gang.patience import Patience
from distriray.gang.profile import make_profile
from distriray.gang.speed import Speed
from distriray.picture import png
from distriray.references import Editing
from distriray.requests import GenerationRequest
from distriray.results import GenerationResult
from distriray.routing.buddy import WorkersUnavailable
from distriray.routing.policies.earliest_deadline import EarliestDeadlineFirst
from distriray.routing.policies.elastic import Elastic, ElasticConfig
from distriray.routing.profile import Entry
from distriray.steps import StepCount
from tests.gang.policies import NewestFirst, Script

from .fleet import CALLER, LONG, FakeHost, FakeWorker, ask, until


def do(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 20))


def test_what_waits_beyond_the_bound_is_refused_and_so_is_all_once_the_host_is_closed() -> None:
    async def scene() -> None:
        async with FakeHost(1, max_queue=2, **opened()) as host:
            first, *others = [host.accept(num_inference_steps=LONG) for _ in range(2)]
            await until(lambda: first.workers)
            others.append(host.accept(num_inference_steps=LONG))
            with pytest.raises(QueueFull, match="2 requests wait, which is the limit") as refused:
                host.accept()
            assert refused.value.retry_after_s >= 0.1
            host.dispatcher.cancel(others.pop())
            others.append(host.accept(num_inference_steps=LONG))
        with pytest.raises(GenerationCancelled, match="the host is closed"):
            host.accept()
        for job in (first, *others):
            assert isinstance(job.ended.exception(), GenerationCancelled)

    do(scene())


async def at(job: Job, step: int) -> None:
    await until(lambda: job.workers is not None and job.step >= step)


async def begins_again_when_all_who_hold_it_die(host: FakeHost, **asked: Any) -> None:
    """Hold a host of one worker to drawing a request anew, with its pictures, when its state is lost."""
    first, job = host.fleet.at(0), host.accept(num_inference_steps=200, **asked)
    given = job.pictures
    await at(job, 10)
    first.die()
    result = await job.ended
    assert result.repairs == 1 and result.segments[-1].first_step == 0
    assert [pictures for _, pictures in host.fleet.at(0).pictures] == [given]


def opened(max_steps: int = LONG) -> dict[str, Any]:
    return {"limits": {"max_steps": max_steps}}


def test_a_request_is_done_by_the_gang_that_it_asked_for() -> None:
    async def scene() -> None:
        async with FakeHost(4) as host:
            result = await host.accept(gang_size=4).ended
            assert result.segments[0].workers == (0, 1, 2, 3) and result.repairs == 0
            assert len(host.dispatcher.free) == 4

    do(scene())


def test_a_request_may_say_how_its_gang_shares_steps() -> None:
    async def scene() -> None:
        async with FakeHost(2, parallel=ParallelConfig(exchange="displaced", max_wait=0.5)) as host:
            own = await host.accept(gang_size=2, num_inference_steps=3).ended
            asked = await host.accept(gang_size=2, num_inference_steps=4, exchange="sync").ended
            whole = ParallelConfig(exchange=PAPER)
            mixed = await host.accept(gang_size=2, num_inference_steps=5, parallel=whole).ended
            assert (own.exchange, asked.exchange, mixed.exchange) == ("displaced", "sync", PAPER)
            views = [host.accept(gang_size=2, **how).view() for how in ({}, {"exchange": "sync"})]
            assert [view.fresh for view in views] == [False, True], "predicted as it is drawn"
            assert asked.summary()["exchange"] == "sync"
            assert mixed.summary()["exchange"] == PAPER.model_dump()
            assert host.dispatcher.metrics.steps == {"displaced": 3, "sync": 4, "mix": 5}

    do(scene())


def test_no_call_to_a_worker_is_made_for_a_client() -> None:
    async def client(host: FakeHost, name: str, **fields: Any) -> None:
        CALLER.set(name)
        job = host.accept(id=name, **fields)
        try:
            await asyncio.shield(job.ended)
        except asyncio.CancelledError:
            host.dispatcher.cancel(job)

    async def scene() -> None:
        async with FakeHost(2, NewestFirst(), **opened()) as host:
            fleet = host.fleet
            first = asyncio.create_task(client(host, "first", num_inference_steps=LONG))
            await until(lambda: any(job.step > 3 for job in host.dispatcher.jobs.values()))
            second = asyncio.create_task(client(host, "second", num_inference_steps=200))
            await until(lambda: "second" in host.dispatcher.jobs and host.dispatcher.jobs["second"].step > 3)
            fleet.at(1).die()  # so that others link and load on this request's behalf
            await second
            await until(lambda: host.dispatcher.jobs["first"].workers is not None)
            first.cancel()
            await until(lambda: not host.dispatcher.jobs)
            await host.whole()
            assert len(fleet.callers) > 15 and set(fleet.callers) == {None}

    do(scene())


def test_a_client_that_leaves_while_another_works_leaves_it_alone() -> None:
    async def scene() -> None:
        async with FakeHost(2, NewestFirst(), **opened()) as host:
            left = host.accept(id="left", num_inference_steps=LONG)
            await at(left, 3)
            kept = host.accept(id="kept", num_inference_steps=60)
            await at(kept, 3)
            host.dispatcher.cancel(left)
            result = await kept.ended
            assert result.repairs == 0 and len(result.segments) == 1
            assert isinstance(left.ended.exception(), GenerationCancelled)

    do(scene())


@pytest.mark.parametrize("gang_size", [1, 2])
def test_a_worker_that_fails_is_replaced_and_its_request_goes_on(
    gang_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ray.serve.distriray")

    async def scene() -> None:
        async with FakeHost(2) as host:
            fleet, old = host.fleet, host.fleet.at(0)
            job = host.accept(gang_size=gang_size, num_inference_steps=60)
            await at(job, 10)
            old.raises = RuntimeError("CUDA error")
            result = await job.ended
            assert result.repairs == 1
            assert gang_size == 1 or result.segments[-1].first_step >= 10  # the other one has the state
            await host.whole()
            assert not old.alive and fleet.at(0) is not old and host.dispatcher.healthy
            assert "CUDA error" in host.dispatcher.group.repairs[0].cause
            lost, broke = (
                f"worker 0 (process {id(old)}) is lost: ",
                f"request {job.request.id}: its gang broke",
            )
            back = f"worker 0 is replaced by process {id(fleet.at(0))}, after "
            for told in (lost, broke, back):
                (message,) = (each for each in caplog.messages if each.startswith(told))
                assert "CUDA error" in message or told is back

    do(scene())


@pytest.mark.parametrize("idle", [True, False])
def test_a_repair_says_what_its_worker_died_of(idle: bool) -> None:
    async def scene() -> None:
        async with FakeHost(1) as host:
            if not idle:
                await at(host.accept(num_inference_steps=60), 1)
            host.fleet.at(0).die()
            await until(lambda: host.dispatcher.group.repairs)
            assert host.dispatcher.group.repairs[0].cause == "died: worker 0"  # as it is told here

    do(scene())


@pytest.mark.parametrize(("device", "beside"), [("cpu", True), ("cuda:0", False)])
def test_gangs_are_formed_beside_others_only_where_devices_allow_it(device: str, beside: bool) -> None:
    async def scene() -> None:
        host = FakeHost(4, **opened())
        host.fleet.device = device
        async with host:
            job = host.accept(gang_size=2, num_inference_steps=LONG)
            decoding = host.accept(gang_size=1, num_inference_steps=200)
            await at(job, 3)
            await at(decoding, 3)
            assert job.workers is not None and decoding.workers is not None
            spare = ({0, 1, 2, 3} - set(job.workers) - set(decoding.workers)).pop()
            host.fleet.at(spare).die()
            await until(lambda: host.dispatcher.group.repairs)
            assert host.fleet.linked_beside is beside
            await at(job, job.step + 3)
            assert job.breaks == 0 and len(job.segments) == (0 if beside else 1)
            assert (await decoding.ended).repairs == 0

    do(scene())


def test_requests_go_on_after_a_rest_that_brings_nobody_back() -> None:
    async def scene() -> None:
        async with FakeHost(2, **opened()) as host:
            job = host.accept(gang_size=2, num_inference_steps=LONG)
            await at(job, 3)
            async with host.dispatcher.at_rest():
                assert not host.dispatcher.leased and job.workers is None
                await asyncio.sleep(0.02)
                assert job.workers is None
            await at(job, job.step + 3)
            assert job.breaks == 0

    do(scene())


@pytest.mark.parametrize("lost", ["dies", "hangs", "raises"])
def test_a_gang_that_breaks_while_all_come_to_rest_is_formed_with_the_others(
    lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distriray.gang.worker_group.HEARTBEAT_S", 0.01)

    async def scene() -> None:
        host = FakeHost(4, **opened(), silence_s=0.1)
        host.fleet.device = "cuda:0"
        async with host:
            job = host.accept(gang_size=2, num_inference_steps=300)
            await at(job, 3)
            assert job.workers is not None
            spare, member = ({0, 1, 2, 3} - set(job.workers)).pop(), host.fleet.at(job.workers[1])
            host.fleet.at(spare).die()
            if lost == "dies":
                member.die()
            elif lost == "hangs":
                member.hangs = True
            else:
                member.raises = RuntimeError("CUDA error")
            await job.ended
            await host.whole()
            assert not host.fleet.linked_beside and host.dispatcher.healthy

    do(scene())


def test_a_failing_worker_does_not_eat_the_queue() -> None:
    async def scene() -> None:
        async with FakeHost(2) as host:
            host.fleet.at(0).raises = RuntimeError("CUDA error")
            jobs = [host.accept(id=str(i), gang_size=1) for i in range(30)]
            results = await asyncio.gather(*(job.ended for job in jobs))
            assert len(results) == 30 and sum(result.repairs for result in results) == 1

    do(scene())


def test_a_request_under_which_two_workers_fail_alike_ends_and_the_host_goes_on() -> None:
    async def scene() -> None:
        async with FakeHost(2) as host:
            job = host.accept(gang_size=2, num_inference_steps=60)
            await at(job, 3)
            for index in range(2):
                host.fleet.at(index).raises = RuntimeError("shapes do not match")
            with pytest.raises(GangBroken, match="shapes do not match"):
                await job.ended
            await host.whole()
            assert (await host.accept(gang_size=2).ended).repairs == 0

    do(scene())


def test_a_refused_request_costs_no_gang_and_no_worker() -> None:
    async def scene() -> None:
        async with FakeHost(2) as host:
            host.fleet.at(1).refuses = InvalidRequest("not so", "scheduler")
            with pytest.raises(InvalidRequest, match="not so"):
                await host.accept(gang_size=2).ended
            host.fleet.at(1).refuses = None
            assert host.dispatcher.free == {0, 1}
            assert (await host.accept(gang_size=2).ended).repairs == 0
            assert len(host.fleet.launched) == 2
            assert host.dispatcher.metrics.outcomes == {"invalid": 1, "finished": 1}, "no fault of the host's"

    do(scene())


def test_a_pause_in_which_nobody_dies_costs_no_step() -> None:
    async def scene() -> None:
        async with FakeHost(2, **opened()) as host:
            job = host.accept(gang_size=2, num_inference_steps=300)
            await at(job, 100)
            host.fleet.at(1).hangs = True
            await asyncio.sleep(2 * host.fleet.timeout_s)
            host.fleet.at(1).hangs = False
            result = await job.ended
            assert result.repairs == 1 and result.segments[1].first_step >= 100
            assert len(host.fleet.launched) == 2

    do(scene())


@pytest.mark.parametrize("dies_first", [True, False])
@pytest.mark.parametrize("place", [0, 1])
def test_a_hang_and_a_death_together_cost_no_step(dies_first: bool, place: int) -> None:
    """The replacement of the dead one is up before the other has come back."""

    async def scene() -> None:
        async with FakeHost(2, policy := Script([(0, 1), (place,)], every=LONG), **opened()) as host:
            fleet, hung, dead = host.fleet, host.fleet.at(1 - place), host.fleet.at(place)
            job = host.accept(num_inference_steps=150)
            await at(job, 40)
            hung.hangs = True
            if not dies_first:
                await asyncio.sleep(2 * fleet.timeout_s)
            dead.die()
            policy.at = 1
            await until(lambda: fleet.at(place) is not dead)
            await asyncio.sleep(2 * fleet.load_s)
            hung.hangs = False
            result = await job.ended
            assert result.segments[-1].workers == (place,) and result.segments[-1].first_step >= 40
            await host.whole()
            assert host.dispatcher.healthy

    do(scene())


def test_holders_that_die_while_a_request_waits_send_it_back_to_the_step_of_the_others() -> None:
    async def scene() -> None:
        gangs = [(0, 1), (2, 3), (2,)]
        async with FakeHost(4, policy := Script(gangs, every=LONG), **opened()) as host:
            fleet = host.fleet
            job = host.accept(num_inference_steps=300)
            await at(job, 30)
            policy.at = 1
            host.dispatcher._decide()
            await until(lambda: job.workers == (2, 3) and job.step > 60)
            before = dict(job.held)
            assert {worker.index for worker in before} == {0, 1}
            for index in (2, 3):
                fleet.at(index).die()
            result = await job.ended
            assert result.segments[-1].first_step == min(before.values()) >= 30

    do(scene())


@pytest.mark.parametrize("gang", [(0, 1), (1,)], ids=str)
@pytest.mark.parametrize("earlier", [(), (2, 3)], ids=["no other has it", "others have an earlier one"])
def test_a_worker_that_cannot_send_a_state_costs_what_only_it_had_and_no_worker(
    earlier: tuple[int, ...], gang: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        gangs = [each for each in (earlier, (0,), gang) if each]
        async with FakeHost(4, policy := Script(gangs, every=LONG), **opened()) as host:
            job = host.accept(num_inference_steps=300)
            for policy.at, workers in enumerate(gangs[:-1]):
                host.dispatcher._decide()
                await until(lambda gang=workers: job.workers == gang and job.step >= 20 * (policy.at + 1))
            kept = job.held.get(WorkerId(2, 2), 0)
            host.fleet.at(0).mute = True
            policy.at += 1
            result = await job.ended
            assert result.segments[-1].workers == gang and result.segments[-1].first_step == kept
            assert len(host.fleet.launched) == 4 and (kept >= 20) == bool(earlier)
            assert "did not send the request's state: its sender died, or cannot" in caplog.text

    do(scene())


def test_a_gang_that_does_not_get_its_pictures_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(*_: object) -> RankResult:
        raise StateLost("lost on the way: no room in the object store")

    monkeypatch.setattr(FakeWorker, "_run", run)

    async def scene() -> None:
        async with FakeHost(2, max_attempts=2) as host:
            with pytest.raises(GangBroken, match="pictures did not come: lost on the way: no room in the"):
                await host.accept(gang_size=2, image=png(Image.new("RGB", (128, 128)))).ended
            assert len(host.fleet.launched) == 2

    do(scene())


@pytest.mark.parametrize(
    "where", [(segments.RunningSegment, "come_back"), (Job, "come_back")], ids=["out", "back"]
)
def test_an_error_of_the_host_in_one_segment_ends_one_request(
    where: tuple[type, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> Any:
        raise KeyError(7)

    async def scene() -> None:
        async with FakeHost(4, **opened()) as host:
            other = host.accept(id="other", gang_size=2, num_inference_steps=300)
            await at(other, 3)
            with monkeypatch.context() as patch:
                patch.setattr(*where, fails)
                with pytest.raises(KeyError):
                    await host.accept(id="hurt", gang_size=2).ended
            await host.whole()
            assert (await other.ended).repairs == 0 and host.dispatcher.healthy

    do(scene())


@pytest.mark.parametrize(
    ("own", "told"), [(ZeroDivisionError, ZeroDivisionError), (StopIteration, RuntimeError)]
)
def test_a_policy_that_fails_fails_the_host_and_nobody_waits_for_ever(
    own: type[Exception], told: type[Exception]
) -> None:
    class Fails:
        review_s = None
        regroups = False

        def plan(self, view: Any, model: Any) -> Any:
            raise own

    async def scene() -> None:
        async with FakeHost(2, Fails()) as host:  # type: ignore[arg-type]
            with pytest.raises(told):
                await host.accept().ended
            assert not host.dispatcher.healthy

    do(scene())


def test_of_all_reviews_that_were_planned_none_is_left_but_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or each would plan another, and there would be as many as there were decisions."""

    async def scene() -> None:
        planned: list[asyncio.TimerHandle] = []
        async with FakeHost(2, Elastic(ElasticConfig(review_s=60.0)), **opened()) as host:
            background = host.dispatcher._background
            later = background.later

            def noted(delay_s: float, callback: Any) -> asyncio.TimerHandle:
                planned.append(later(delay_s, callback))
                return planned[-1]

            monkeypatch.setattr(background, "later", noted)
            for decisions in range(1, 4):
                host.accept(num_inference_steps=LONG)
                await until(lambda decisions=decisions: len(planned) >= decisions)
            assert [handle for handle in planned if not handle.cancelled()] == planned[-1:]
        assert planned[-1].cancelled(), "a closed host decides nothing"

    do(scene())


def test_the_first_fault_of_a_host_is_the_one_that_is_told_and_its_gangs_leave(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Fails(NewestFirst):
        def plan(self, view: Any, model: Any) -> Any:
            if len(view.requests) > 1:
                raise ZeroDivisionError("the policy's own")
            return super().plan(view, model)

    async def scene() -> None:
        async with FakeHost(2, Fails(), **opened()) as host:
            running = host.accept(num_inference_steps=LONG)
            await at(running, 3)
            with pytest.raises(ZeroDivisionError):
                await host.accept().ended
            with pytest.raises(WorkersUnavailable):  # whose gang has not left yet
                await host.accept().ended
            assert str(host.dispatcher.fault) == "the policy's own"
            faults = [record.exc_info[1] for record in caplog.records if record.exc_info]
            assert faults == [host.dispatcher.fault], "with its traceback, and alone"
            await host.whole()

    do(scene())


def test_a_host_that_is_closed_shows_no_worker_and_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[tuple[str, ...], float] = {}

    def note(name: str, value: float, **tags: str) -> None:
        shown[name, *tags.values()] = value

    async def scene() -> None:
        async with FakeHost(2, **opened()) as host:
            monkeypatch.setattr(host.dispatcher.metrics, "_set", note)
            await at(host.accept(gang_size=2, num_inference_steps=LONG), 3)
            host.accept()
            await until(lambda: shown.get((Name.WAITING,)) and shown.get((Name.WORKERS, "busy")))
        assert len(shown) == 6 and not any(shown.values())

    do(scene())


def test_a_host_predicts_that_a_request_waits_for_those_that_its_policy_leaves_alone() -> None:
    async def scene() -> None:
        async with FakeHost(1, **opened()) as host:
            long = host.accept(num_inference_steps=LONG)
            await at(long, 1)
            assert host.accept(deadline_s=60.0).predicted_s > 0.9 * long.predicted_s

    do(scene())


def test_each_worker_is_busy_free_or_down_while_a_gang_that_lost_one_has_not_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: dict[str, float] = {}

    def note(name: str, value: float, **tags: str) -> None:
        if name == Name.WORKERS:
            shown[tags["state"]] = value

    async def scene() -> None:
        async with FakeHost(4, **opened()) as host:
            host.fleet.load_s, host.fleet.timeout_s = 1.0, 1.0
            monkeypatch.setattr(host.dispatcher.metrics, "_set", note)
            job = host.accept(gang_size=2, num_inference_steps=LONG)
            await at(job, 3)
            assert job.workers is not None
            first, second = (host.fleet.at(index) for index in job.workers)
            first.hangs = True
            second.die()
            await until(lambda: shown.get("down"))
            assert job.breaking and shown == {"busy": 1, "free": 2, "down": 1}
            first.hangs = False
            host.dispatcher.cancel(job)

    do(scene())


def test_workers_forget_what_is_over_though_nobody_told_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distriray.gang.worker_group.HEARTBEAT_S", 0.01)

    async def scene() -> None:
        async with FakeHost(1, **opened()) as host:
            worker = host.fleet.at(0)
            kept = host.accept(num_inference_steps=LONG)
            await at(kept, 1)
            worker.states |= {0: 5, 99: 5}  # one of a request that is over, one of a request yet to come
            await until(lambda: 0 not in worker.states)
            assert set(worker.states) == {kept.number, 99}

    do(scene())


def test_a_repair_is_told_with_who_was_lost() -> None:
    async def scene() -> None:
        async with FakeHost(2) as host:
            job = host.accept(gang_size=2, num_inference_steps=60)
            await at(job, 10)
            host.fleet.at(1).die()
            await job.ended
            told = [job.events.get_nowait() for _ in range(job.events.qsize())]
            (repaired,) = [event for event in told if isinstance(event, Repaired)]
            assert repaired.lost_workers == (1,) and repaired.step >= 10

    do(scene())


@pytest.mark.parametrize("cuts_vae", [True, False])
def test_a_gang_that_decodes_counts_as_busy_with_all_who_decode(cuts_vae: bool) -> None:
    async def scene() -> None:
        host = FakeHost(2)
        host.fleet.cuts_vae = cuts_vae
        async with host:
            for parallel, busy in ((None, 2 if cuts_vae else 1), (ParallelConfig(parallel_vae=False), 1)):
                request = ask(gang_size=2, parallel=parallel)
                job = Job(admit(request, host.config, host.dispatcher.facts), number=1)
                job.start((0, 1), 1)
                assert host.dispatcher._at_work(job) == 2
                job.progress(Progress(6, 6, False))
                assert host.dispatcher._at_work(job) == busy

    do(scene())


@asynccontextmanager
async def impatient(workers: int, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeHost]:
    """A host that gives compute up that is silent for 0.3 s: it expects steps of a millisecond."""
    monkeypatch.setattr(segments, "GRACE_S", 0.05)
    async with FakeHost(workers, stall_s=0.3) as host:
        entry = Entry(gang=1, height=128, width=128, step_s=0.001)
        facts = host.dispatcher.facts
        host.dispatcher.speed = Speed(make_profile(host.config, facts, (entry,)))
        yield host


@pytest.mark.parametrize("where", ["prepare", "step", "decode"])
@pytest.mark.parametrize("size", [1, 2])
def test_compute_that_hangs_while_its_worker_answers_is_given_up_and_the_picture_made_elsewhere(
    where: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        async with impatient(2, monkeypatch) as host:
            stuck = host.fleet.at(0)
            stuck.stuck = where
            job = host.accept(gang_size=size)
            await until(lambda: job.workers is not None)
            beside = host.accept(gang_size=1) if size == 1 else None
            result = await job.ended
            assert result.repairs == 1 and not stuck.alive
            if beside is not None:
                assert (await beside.ended).repairs == 0, "nobody pays for another"
            await host.whole()
            assert [repair.cause[:32] for repair in host.dispatcher.group.repairs][:1] == [
                "neither made a step nor came bac"
            ]
            assert (await host.accept(gang_size=size).ended).repairs == 0

    do(scene())


def test_compute_that_hangs_is_given_up_once_however_long_its_process_takes_to_die(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two that hang alike would be the request's own fault."""

    async def scene() -> None:
        async with impatient(1, monkeypatch) as host:
            stuck = host.fleet.at(0)
            stuck.stuck = "prepare"
            later = asyncio.get_running_loop().call_later
            monkeypatch.setattr(stuck, "kill", lambda: later(0.1, stuck.die))
            assert (await host.accept().ended).repairs == 1

    do(scene())


def test_a_rank_that_computes_for_long_before_it_hears_of_a_death_keeps_what_it_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step takes a second here, as far as is known."""
    monkeypatch.setattr(segments, "GRACE_S", 0.05)

    async def scene() -> None:
        async with FakeHost(2) as host:
            slow = host.fleet.at(0)
            job = host.accept(gang_size=2, num_inference_steps=60)
            await at(job, 10)
            slow.stuck = "step"
            host.fleet.at(1).die()
            await asyncio.sleep(5 * (host.fleet.timeout_s + segments.GRACE_S))
            slow.stuck = ""
            result = await job.ended
            assert slow.alive and result.segments[-1].first_step >= 10

    do(scene())


def test_time_that_ranks_waited_for_one_that_hangs_is_not_given_to_it_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(segments, "GRACE_S", 0.05)

    async def scene() -> None:
        host = FakeHost(2, timeout_s=0.5)
        host.fleet.timeout_s = 0.5
        async with host:
            entry = Entry(gang=1, height=128, width=128, step_s=0.001)
            host.dispatcher.speed = Speed(make_profile(host.config, host.dispatcher.facts, (entry,)))
            job = host.accept(gang_size=2, num_inference_steps=200)
            await at(job, 10)
            host.fleet.at(1).hangs = True
            await job.ended
            await host.whole()
            cause = host.dispatcher.group.repairs[0].cause
            found = re.fullmatch(r"did not leave its broken gang within (.*) s", cause)
            assert found and 0.55 <= float(found[1]) < 0.9

    do(scene())


def test_a_rank_that_prepares_for_long_after_others_gave_it_up_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one that loads an adapter which the others have."""
    monkeypatch.setattr(segments, "GRACE_S", 0.05)

    async def scene() -> None:
        async with FakeHost(2, stall_s=5.0) as host:
            entry = Entry(gang=1, height=128, width=128, step_s=0.001)
            host.dispatcher.speed = Speed(make_profile(host.config, host.dispatcher.facts, (entry,)))
            slow = host.fleet.at(1)

            async def loads(order: SegmentOrder, state: Any) -> RankResult:
                monkeypatch.undo()
                await asyncio.sleep(10 * host.fleet.timeout_s)
                return RankResult(SegmentEnd.BROKEN, order.step, cause="the peers have left", broken=True)

            monkeypatch.setattr(slow, "_run", loads)
            result = await host.accept(gang_size=2, num_inference_steps=60).ended
            assert result.repairs == 1 and len(host.fleet.launched) == 2

    do(scene())


def test_a_request_that_hangs_wherever_it_goes_ends_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with impatient(1, monkeypatch) as host:
            host.fleet.stuck = {0: "step"}
            host.fleet.at(0).stuck = "step"
            with pytest.raises(GangBroken, match="neither made a step nor came back for 0.3 s"):
                await host.accept().ended
            host.fleet.stuck = {}
            host.fleet.at(0).stuck = ""
            await host.whole()

    do(scene())


def test_compute_is_waited_for_as_long_as_it_may_take() -> None:
    patience = Patience(floor_s=60.0, expected_s=1.0, now_s=0.0)
    assert patience.left_s(50.0) == pytest.approx(10.0) and patience.left_s(61.0) == 0.0
    patience.heard(50.0)
    assert patience.bound_s == 1500.0, "such a step may take as long again, and much longer"
    assert patience.left_s(1000.0) == pytest.approx(550.0) and patience.left_s(1551.0) == 0.0
    patience.heard(51.0)
    assert patience.bound_s == 1500.0
    assert Patience(floor_s=60.0, expected_s=100.0, now_s=0.0).bound_s == 3000.0, "a large picture"


def test_what_of_a_prompt_is_not_used_is_in_the_result_and_the_log_without_the_prompt(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scene() -> None:
        async with FakeHost(2) as host:
            host.fleet.warnings = ("prompt has 90 tokens",)
            result = await host.accept(id="mine", prompt="a secret lake").ended
            assert result.warnings == ["prompt has 90 tokens"]

    with caplog.at_level(logging.WARNING):
        do(scene())
    assert "request mine: prompt has 90 tokens" in caplog.text and "secret" not in caplog.text


def test_a_default_that_the_model_has_nothing_for_is_found_when_the_host_starts() -> None:
    async def scene() -> None:
        host = FakeHost(1, defaults={"scheduler": "ddim"})
        host.fleet.terms = Terms(schedulers=("euler",))
        with pytest.raises(UnsupportedModel, match="scheduler ddim is not for this model"):
            await host.dispatcher.start()
        await host.dispatcher.close()

    do(scene())


DEALT: dict[str, Any] = {"attention": "ulysses"}


def test_heads_that_cannot_be_dealt_to_a_gang_are_found_when_the_host_starts() -> None:
    async def scene() -> None:
        host = FakeHost(8, parallel=DEALT)
        host.fleet.key_heads = 2
        said = r"cannot deal 2 heads of m to gangs of 4 or 8; use 'auto', .* gangs of \[1, 2\] only"
        with pytest.raises(UnsupportedModel, match=said):
            await host.dispatcher.start()
        await host.dispatcher.close()

    do(scene())


def test_short_steps_of_a_model_without_any_are_found_when_the_host_starts_or_they_are_asked_for() -> None:
    short = ParallelConfig(cache_interval=2)

    async def scene() -> None:
        refusing, host = FakeHost(1, parallel=short), FakeHost(1)
        for each in (refusing, host):
            each.fleet.has_short_steps = False
        with pytest.raises(UnsupportedModel, match="cache_interval is for transformers, which m is not"):
            await refusing.dispatcher.start()
        await refusing.dispatcher.close()
        async with host:
            for asked in ({}, {"gang_size": 1}):
                with pytest.raises(InvalidRequest, match="cache_interval is for transformers") as refused:
                    host.accept(parallel=short, **asked)
                assert refused.value.param == "parallel"

    do(scene())


def test_steps_that_are_short_in_turn_are_not_predicted_as_those_that_are_all_fresh() -> None:
    async def scene() -> None:
        async with FakeHost(2, parallel=ParallelConfig(exchange="sync", cache_interval=2)) as host:
            assert not host.accept().view().fresh
            assert host.accept(parallel=ParallelConfig(exchange="sync")).view().fresh

    do(scene())


@pytest.mark.parametrize(
    ("heads", "parallel"),
    [
        (8, DEALT),
        (30, DEALT),
        (2, {"attention": "auto"}),
        (2, {**DEALT, "exchange": "none"}),
        (4, {**DEALT, "cfg_parallel": True}),  # halves of eight are cut among four
        (None, DEALT),  # of a network that attends to nothing
    ],
    ids=str,
)
def test_a_host_starts_where_heads_can_be_dealt_or_need_not_be(
    heads: int | None, parallel: dict[str, Any]
) -> None:
    async def scene() -> None:
        host = FakeHost(8, parallel=parallel)
        host.fleet.key_heads = heads
        async with host:
            assert (await host.accept(gang_size=8).ended).images

    do(scene())


def test_a_request_that_has_heads_dealt_is_refused_before_a_gang_may_grow_to_what_they_are_not_dealt_to() -> (
    None
):
    async def scene() -> None:
        host = FakeHost(4, limits={"min_side": 8})
        host.fleet.key_heads = 2
        async with host:
            with pytest.raises(InvalidRequest, match="2 heads of m to gangs of 4") as refused:
                host.accept(parallel=ParallelConfig(**DEALT))
            assert refused.value.param == "parallel"
            for chosen in ({"gang_size": 2}, {"height": 32}):  # which is cut in two at most
                await host.accept(parallel=ParallelConfig(**DEALT), **chosen).ended

    do(scene())


def test_a_host_that_runs_takes_no_configuration_that_its_gangs_cannot_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene() -> None:
        fake = FakeHost(4)
        fake.fleet.key_heads = 2
        monkeypatch.setattr("distriray.gang.host.Launcher", lambda *_: fake.fleet)
        group = SimpleNamespace(id=b"a host")
        placement: Any = SimpleNamespace(group=group, device="cpu", release=lambda: None)
        host = Host(fake.config, placement, EarliestDeadlineFirst())
        await host._dispatcher.start()
        changed = fake.config.model_copy(update={"parallel": ParallelConfig(**DEALT), "max_queue": 1})
        with pytest.raises(ValueError, match="2 heads of m to gangs of 4"):
            host.configure(changed)
        assert host.config == fake.config == host._dispatcher.config
        host.configure(fake.config.model_copy(update={"max_queue": 1}))
        assert host._dispatcher.config.max_queue == 1
        await host.close()

    do(scene())


@pytest.mark.parametrize("limits", [{"max_steps": 1}, {"max_side": 64}, {}], ids=str)
def test_limits_that_refuse_what_a_client_leaves_open_are_told_of_when_the_host_starts(
    limits: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        async with FakeHost(2, limits=limits) as host:
            told = "requests that leave it open are refused" in caplog.text
            assert host.dispatcher.healthy and told == bool(limits)
            assert all(str(limit) in caplog.text for limit in limits.values())

    do(scene())


def test_predictions_are_of_calls_of_the_network_and_of_its_branches() -> None:
    async def predicted(own: StepCount, guides: bool, **fields: Any) -> float:
        host = FakeHost(1)
        host.fleet.own_steps, host.fleet.guides = own, guides
        async with host:
            job = host.accept(num_inference_steps=50, **fields)
            return job.predicted_s - host.dispatcher.speed.model.times(1, *job.view().shape).decode_s

    async def scene() -> None:
        first_order, heun = StepCount(), StepCount(2, -1)
        guided = await predicted(first_order, True)
        assert await predicted(first_order, True, guidance_scale=1.0) == pytest.approx(guided / 2)
        assert await predicted(first_order, False) == pytest.approx(guided), "what it was guessed for"
        assert await predicted(heun, True) == pytest.approx(guided * 99 / 50)
        assert await predicted(heun, True, scheduler="euler") == pytest.approx(guided)
        assert await predicted(first_order, True, scheduler="heun") == pytest.approx(guided * 99 / 50)

    do(scene())


def test_a_host_says_that_it_is_being_repaired_and_takes_requests_meanwhile() -> None:
    async def scene() -> None:
        async with FakeHost(2) as host:
            assert host.dispatcher.repair_s() is None
            host.fleet.load_s = 0.1
            for index in (0, 1):
                host.fleet.at(index).die()
            await until(lambda: not host.dispatcher.view().workers)
            assert host.dispatcher.repair_s() is not None
            job = host.accept(gang_size=2)
            assert (await job.ended).segments[0].workers == (0, 1)
            await host.whole()
            assert host.dispatcher.repair_s() is None
            took_s = host.dispatcher.group.repairs[-1].seconds
            host.fleet.at(1).die()
            await until(lambda: len(host.dispatcher.view().workers) == 1)
            assert host.dispatcher.repair_s() == took_s

    do(scene())


def test_a_host_that_cannot_be_repaired_does_not_say_that_it_will_be() -> None:
    async def scene() -> None:
        async with FakeHost(1) as host:
            host.fleet.load_raises[0] = RuntimeError("the device is gone")
            host.fleet.at(0).die()
            await until(lambda: host.dispatcher.group.failure is not None)
            assert host.dispatcher.repair_s() is None and host.dispatcher.group.sizes == set()

    do(scene())


def test_requests_that_wait_for_a_gang_that_will_never_be_end_and_others_are_done() -> None:
    async def scene() -> None:
        async with FakeHost(2) as host:
            host.fleet.load_raises[1] = RuntimeError("no device")
            running = host.accept(id="running", gang_size=2, num_inference_steps=60)
            waiting = host.accept(id="waiting", gang_size=2)
            small = host.accept(id="small", gang_size=1)
            await at(running, 10)
            host.fleet.at(1).die()
            with pytest.raises(GangBroken, match="no device"):
                await running.ended
            with pytest.raises(NotEnoughDevices, match="no device"):  # it broke none
                await waiting.ended
            assert (await small.ended).gang_size == 1
            with pytest.raises(NotEnoughDevices, match="no device"):
                host.accept(gang_size=2)
            assert not host.dispatcher.jobs and not host.dispatcher.healthy

    do(scene())


def test_a_picture_too_small_for_every_gang_is_refused() -> None:
    async def scene() -> None:
        async with FakeHost(4, gang_sizes=(4,), limits={"min_side": 8}) as host:
            with pytest.raises(InvalidRequest, match="too small") as refused:
                host.accept(height=16)
            assert refused.value.param == "height"

    do(scene())


def test_closing_ends_though_a_worker_answers_at_that_very_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distriray.gang.worker_group.HEARTBEAT_S", 0.0)

    async def scene() -> None:
        for turn in range(40):
            async with FakeHost(2, **opened()) as host:
                host.accept(num_inference_steps=LONG)
                await asyncio.sleep(0.0002 * turn)
            assert not any(worker.alive for worker in host.fleet.launched)

    do(scene())


def test_a_worker_that_dies_once_it_is_linked_costs_a_host_that_starts_nothing_but_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    join = FakeWorker.link

    def link(worker: FakeWorker, links: Any) -> asyncio.Future[None]:
        async def slowly() -> None:
            await join(worker, links)
            worker.fleet.at(1).die()
            await asyncio.sleep(0.02)  # in which the host hears of it, and is not yet up

        return join(worker, links) if worker.index else asyncio.ensure_future(slowly())

    async def scene() -> None:
        monkeypatch.setattr(FakeWorker, "link", link)
        async with FakeHost(2) as host:
            monkeypatch.undo()
            assert host.dispatcher.fault is None
            await host.whole()
            assert (await host.accept(gang_size=2).ended).repairs == 0 and host.dispatcher.healthy

    do(scene())


def test_a_link_that_never_ends_costs_its_worker_and_not_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with FakeHost(2) as host:
            stuck = host.fleet.at(1)
            monkeypatch.setattr(stuck, "link", lambda _: asyncio.get_running_loop().create_future())
            host.dispatcher.group.reform([member.id for member in host.dispatcher.group.members])
            await host.whole()
            assert not stuck.alive and host.dispatcher.healthy

    do(scene())


@pytest.mark.parametrize(
    "where", [(HostMetrics, "segment"), (HostMetrics, "ended"), (Speed, "learn")], ids=["of", "all", "speed"]
)
def test_a_picture_that_was_drawn_reaches_its_owner_whatever_is_counted_or_learnt_of_it(
    where: tuple[type, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError

    async def scene() -> None:
        async with FakeHost(1) as host:
            monkeypatch.setattr(*where, fails)
            assert (await host.accept().ended).images

    do(scene())


def test_every_request_ends_and_no_worker_is_replaced_where_metrics_cannot_be_exported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise OSError("the exporter is gone")

    async def scene() -> None:
        async with FakeHost(1, **opened()) as host:
            for kind, verb in ((Counter, "inc"), (Gauge, "set"), (Histogram, "observe")):
                monkeypatch.setattr(kind, verb, fails)
            assert (await host.accept().ended).images
            left = [host.accept(num_inference_steps=LONG) for _ in range(3)]
            await at(left[0], 1)
            assert host.dispatcher.healthy and len(host.fleet.launched) == 1
        assert all(isinstance(job.ended.exception(), GenerationCancelled) for job in left)

    do(scene())
    assert "distriray_requests_total was not counted: OSError" in caplog.text


ON_PICTURE: dict[str, Any] = {"image": Image.new("RGB", (128, 128), "red"), "strength": 1.0}


def test_pictures_are_put_once_for_a_gang_that_begins_and_never_for_one_that_goes_on() -> None:
    async def scene() -> None:
        async with FakeHost(4, policy := Script([(0, 1), (0, 1, 2, 3)], every=LONG), **opened()) as host:
            job = host.accept(num_inference_steps=60, **ON_PICTURE)
            given = job.pictures
            await at(job, 10)
            policy.at = 1
            job.yield_() and host.dispatcher._stop(job, StopSignal.YIELD)
            result = await job.ended
            assert [len(segment.workers) for segment in result.segments] == [2, 4]
            assert host.fleet.shared == 1 and [*given] == ["image"]
            told = [pictures for worker in host.fleet.launched for _, pictures in worker.pictures]
            assert told.count(given) == 2 and told.count(None) == 4
            assert not job.pictures, "nobody has them any more"
            await host.accept().ended
            assert host.fleet.shared == 1

    do(scene())


def test_a_gang_that_broke_before_anybody_prepared_is_followed_by_one_that_gets_the_pictures_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene() -> None:
        async with impatient(1, monkeypatch) as host:
            first = host.fleet.at(0)
            first.stuck = "prepare"
            job = host.accept(**ON_PICTURE)
            given = job.pictures
            assert (await job.ended).repairs == 1
            assert [pictures for _, pictures in first.pictures] == [given]
            assert [pictures for _, pictures in host.fleet.at(0).pictures] == [given]
            assert host.fleet.shared == 2

    do(scene())


def test_when_all_who_hold_a_state_die_its_request_begins_again_with_its_pictures() -> None:
    async def scene() -> None:
        async with FakeHost(1, **opened()) as host:
            await begins_again_when_all_who_hold_it_die(host, **ON_PICTURE)

    do(scene())


def test_orders_events_and_status_have_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with FakeHost(1, **opened()) as host:
            orders: list[SegmentOrder] = []
            run = host.fleet.at(0)._run

            async def noted(order: SegmentOrder, state: Any) -> Any:
                orders.append(order)
                return await run(order, state)

            monkeypatch.setattr(host.fleet.at(0), "_run", noted)
            marked = png(Image.effect_noise((128, 128), 90))
            job = host.accept(num_inference_steps=300, image=marked, mask_image=marked)
            await at(job, 3)
            events = [job.events.get_nowait() for _ in range(job.events.qsize())]
            said = pickle.dumps((orders, events, job.view(), job.status(0.0), host.dispatcher.view()))
            assert len(orders) == 1 and len(said) < len(marked) / 2
            assert len(pickle.dumps(await job.ended)) < len(marked) / 2

    do(scene())


def test_what_is_done_on_an_image_is_planned_with_the_steps_that_are_left_of_it() -> None:
    async def scene() -> None:
        async with FakeHost(1, **opened()) as host:
            whole = host.accept(num_inference_steps=50)
            part = host.accept(num_inference_steps=50, **{**ON_PICTURE, "strength": 0.3})
            assert (whole.num_steps, part.num_steps) == (50, 15)
            assert part.view().steps_total == 15
            with pytest.raises(InvalidRequest, match="leaves none to do; use 0.02 or more"):
                host.accept(num_inference_steps=50, **{**ON_PICTURE, "strength": 0.01})

    do(scene())


def test_a_model_of_fixed_steps_starts_and_refuses_other_numbers() -> None:
    async def scene() -> None:
        host = FakeHost(1, **opened())
        host.fleet.terms = Terms(num_inference_steps=9, fixes_steps=True)
        async with host:
            with pytest.raises(InvalidRequest, match="steps 8: .* of its 9 steps itself; leave") as refused:
                host.accept(num_inference_steps=8)
            assert refused.value.param == "num_inference_steps"
            for steps in (None, 9):
                await host.accept(num_inference_steps=steps).ended
            measured = await calibrate(host.config, host.dispatcher.facts, own(host))
            assert measured.entries

    do(scene())


def test_a_model_that_fills_in_masks_starts_and_refuses_what_has_none() -> None:
    async def scene() -> None:
        host = FakeHost(1, **opened())
        host.fleet.terms = Terms(needs_mask=True)
        async with host:
            with pytest.raises(InvalidRequest, match="needs an image and a mask_image") as refused:
                host.accept(image=Image.new("L", (128, 128)))
            assert refused.value.param == "mask_image"
            await host.accept(image=Image.new("L", (128, 128)), mask_image=Image.new("L", (128, 128))).ended
            measured = await calibrate(host.config, host.dispatcher.facts, own(host))
            assert measured.entries

    do(scene())


def test_a_model_that_draws_nothing_from_text_alone_starts_and_refuses_what_has_no_picture() -> None:
    async def scene() -> None:
        host = FakeHost(1, **opened())
        host.fleet.terms = Terms(editing=Editing(1, needs_references=True))
        async with host:
            with pytest.raises(InvalidRequest, match="edits pictures, and needs an image") as refused:
                host.accept()
            assert refused.value.param == "image"
            await host.accept(image=Image.new("RGB", (128, 128))).ended
            measured = await calibrate(host.config, host.dispatcher.facts, own(host))
            assert measured.entries

    do(scene())


def own(host: FakeHost) -> Any:
    """Draws a request of the host's own."""

    async def measure(request: GenerationRequest) -> GenerationResult:
        return await host.dispatcher.accept_own(request).ended

    return measure
