"""Where requests go when hosts are full, die or are not there."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectLostError,
    OwnerDiedError,
    RaySystemError,
    TaskCancelledError,
)
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    RequestCancelledError,
)
from ray.util import metrics

from deployments import pool_client, pool_state
from deployments.config import AppConfig
from deployments.host_report import HostReport
from deployments.models import sizes_of
from deployments.router import Router
from distriray.denoise.pipelines.registry import PIPELINES
from distriray.denoise.pipelines.sizes import Sizes
from distriray.denoise.pipelines.terms import Terms
from distriray.errors import (
    DeadlineUnmet,
    GangBroken,
    GenerationCancelled,
    InvalidRequest,
    ModelNotFound,
    NotEnoughDevices,
    QueueFull,
    TooLong,
)
from distriray.events import Event, Finished, Preview, Queued, Step
from distriray.gang.admission import admit
from distriray.gang.config import HostConfig
from distriray.gang.metrics import Refusals
from distriray.limits import Limits
from distriray.models import ModelSpec
from distriray.picture import Picture
from distriray.references import Editing
from distriray.requests import Defaults, GenerationRequest
from distriray.results import GenerationResult, Segment, Timings
from distriray.routing.latency import LatencyModel
from distriray.routing.router import HostState, Route, route
from distriray.service import ModelCard
from distriray.steps import StepCount

from ..gang.fleet import CALLER
from .test_pool_state import FACTS, report
from .test_pool_state import ask as view_of
from .test_pool_state import model as model_of

CREATED = 1_800_000_000
Deed = Callable[[str, GenerationRequest], Any]


@pytest.fixture(autouse=True)
def serve_tells_who_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_client, "members_of", lambda handle: tuple(handle.hosts))


class FakeHandle:
    """A Serve handle of a pool: its hosts answer as told, and `calls` says what they were asked.

    Without hosts, a call to any of them waits `wakes_s`, and then there is one, which `woken` counts. Hosts
    that are `hung` take calls and never answer; those in `cuts` end one, after so many events, with neither a
    result nor an error; `cancelled` are those that were told to stop. `others` have another model.
    """

    def __init__(self, *hosts: str, waiting: int = 0) -> None:
        self.hosts = list(hosts)
        self.waiting = waiting
        self.config, self.facts, self.latency = HostConfig(), FACTS, model_of()
        self.silent: set[str] = set()
        self.deaf: set[str] = set()
        self.free: set[str] = set()
        self.answer: Exception | None = None
        self.callers: list[str | None] = []
        self.gang_sizes: tuple[int, ...] | None = None
        self.workers, self.takes_s = 1, 0.0
        self.wakes_s, self.woken = 0.0, 0
        self.hung: set[str] = set()
        self.others: set[str] = set()
        self.cuts: dict[str, int] = {}
        self.cancelled: list[str] = []
        self.called_off: list[str] = []
        self.over: set[tuple[str, str]] = set()
        self.undeployed = self.lost_at_start = False
        self.asked: Counter[str] = Counter()
        self.report = SimpleNamespace(remote=lambda *asked: Answer(self._tell(*asked)))
        self.ping = SimpleNamespace(remote=lambda host: Answer(self._ping(host)))
        self.cancel = SimpleNamespace(remote=lambda host, name: Answer(self._cancel(host, name)))
        self.deeds: list[Deed] = []
        self.calls: list[tuple[str, GenerationRequest]] = []
        self.generate = SimpleNamespace(remote=self._generate)
        self.stream = SimpleNamespace(remote=self._stream)

    def options(self, **_: Any) -> FakeHandle:
        return self

    def _report(self, host: str) -> HostReport:
        requests = (view_of(f"r{i}", 100.0) for i in range(0 if host in self.free else self.waiting))
        told = report(host, *requests, max_queue=4, sizes=self.config.sizes)
        assert told.knowledge is not None
        config = HostConfig(model=ModelSpec(name="other")) if host in self.others else self.config
        knowledge = replace(told.knowledge, config=config, facts=self.facts, latency=self.latency)
        sizes = told.state.gang_sizes if self.gang_sizes is None else self.gang_sizes
        return replace(told, knowledge=knowledge, state=replace(told.state, gang_sizes=sizes))

    async def _ping(self, host: str) -> int:
        self.asked["ping"] += 1
        if host in self.silent:
            raise TimeoutError
        return self.workers

    async def _cancel(self, host: str, request_id: str) -> bool:
        self.asked["cancel"] += 1
        while host in self.hung:
            await asyncio.sleep(0.001)
        self.called_off.append(host)
        if host not in self.hosts:
            return False
        has = {(at, request.id) for at, request in self.calls} - self.over
        if there := (host, request_id) in has:
            self.over.add((host, request_id))
        return there

    async def _tell(self, host: str | None, known: str | None) -> HostReport:
        self.asked["report"] += 1
        self.callers.append(CALLER.get())
        if self.undeployed:
            raise DeploymentUnavailableError(DeploymentID("pool", "app"))
        if host is None:
            while not self.hosts:
                await asyncio.sleep(self.wakes_s)
                self.hosts.append(f"woken-{self.woken}")
                self.woken += 1
            if self.lost_at_start:
                raise ActorDiedError
            host = next(host for host in self.hosts if host not in self.silent)
        if host in self.silent:
            raise TimeoutError
        while host in self.deaf:
            await asyncio.sleep(0.01)
        if self.answer is not None:
            raise self.answer
        return self._report(host)

    def _do(self, host: str, request: GenerationRequest) -> Any:
        self.calls.append((host, request))
        self.over.discard((host, request.id))
        if host in self.others:
            raise ModelNotFound(f"no model {request.model!r} here; this host has 'other'")
        return self.deeds.pop(0)(host, request) if self.deeds else result_of(request)

    def _generate(self, host: str, request: GenerationRequest, router: str | None) -> Stream:
        async def events() -> AsyncGenerator[Event, None]:
            made = self._do(host, request)
            while host in self.hung:
                await asyncio.sleep(0.001)
            yield Queued(request.id, 0, 0.0)
            await asyncio.sleep(self.takes_s)
            self._check(host, request)
            yield Finished(request.id, made)

        return Stream(self._cut(host, events()), lambda: self.cancelled.append(host))

    def _stream(self, host: str, request: GenerationRequest, router: str | None) -> Stream:
        async def events() -> AsyncGenerator[Event, None]:
            while host in self.hung:
                await asyncio.sleep(0.001)
            self.over.discard((host, request.id))
            for step in range(1, 4):
                if step == 1:
                    yield Queued(request.id, 0, 0.0)
                if step == 3:
                    made = self._do(host, request)
                self._check(host, request)
                yield Step(request.id, step, 3, 1, 0.0)
                yield Preview(request.id, step, step - 1, Image.new("RGB", (8, 8)))
            yield Finished(request.id, made)

        return Stream(self._cut(host, events()), lambda: self.cancelled.append(host))

    def _check(self, host: str, request: GenerationRequest) -> None:
        if (host, request.id) in self.over:
            raise GenerationCancelled(f"request {request.id} was cancelled at step 1")

    async def _cut(self, host: str, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        left = self.cuts.pop(host, -1)
        async with aclosing(events):
            while left and (event := await anext(events, None)):
                left -= 1
                yield event
            if not left:
                self.over.update((at, request.id) for at, request in self.calls if at == host)


class Answer:
    """What a Serve handle's call gives: to be awaited, or cancelled."""

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self._work = work

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._work.__await__()

    def cancel(self) -> None:
        self._work.close()


class Stream:
    """The same of a streaming call."""

    def __init__(self, events: AsyncGenerator[Event, None], stopped: Callable[[], None]) -> None:
        self._events, self.cancel = events, stopped

    def __aiter__(self) -> AsyncGenerator[Event, None]:
        return self._events


def result_of(request: GenerationRequest) -> GenerationResult:
    timings = Timings(queued_s=0, prepare_s=0, denoise_s=0, decode_s=0, total_s=0)
    segment = Segment(workers=(0,), first_step=0, last_step=3, seconds=0, sent_at=0, formed_at=0, left_at=0)
    return GenerationResult(
        id=request.id, model="m", height=512, width=512, seeds=[request.seed or 0], timings=timings,
        segments=[segment], images=[Image.new("RGB", (8, 8))],
    )  # fmt: skip


async def silent() -> None:
    raise TimeoutError


def dies(host: str, request: GenerationRequest) -> Any:
    raise ActorDiedError()


def is_full(host: str, request: GenerationRequest) -> Any:
    raise QueueFull("full", 3.0)


def front(
    refresh_s: float = 1000.0,
    accept_s: float = 5.0,
    draw: random.Random | None = None,
    **handles: FakeHandle,
) -> Router:
    pools = [{"name": name, "min_hosts": 0, "max_queue": 2} for name in handles]
    router = {"refresh_s": refresh_s, "accept_s": accept_s}
    config = AppConfig.model_validate({"pools": pools, "router": router})
    return Router(config, handles, draw or random.Random(0), CREATED)  # type: ignore[arg-type]


def request(**fields: Any) -> GenerationRequest:
    return GenerationRequest(prompt="a lake", num_inference_steps=10, **fields)


def generate(service: Router, **fields: Any) -> GenerationResult:
    return asyncio.run(service.generate(request(**fields)))


def test_a_request_goes_to_a_host_with_everything_settled() -> None:
    handle = FakeHandle("a")
    generate(front(pool=handle))
    ((host, sent),) = handle.calls
    assert host == "a" and (sent.height, sent.width) == (512, 512) and sent.seed is not None


@pytest.mark.parametrize("trouble", [dies, is_full])
def test_another_host_takes_over_with_the_same_seed(trouble: Deed) -> None:
    handle = FakeHandle("a", "b")
    handle.deeds = [trouble]
    generate(front(pool=handle))
    hosts, seeds = {host for host, _ in handle.calls}, {sent.seed for _, sent in handle.calls}
    assert hosts == {"a", "b"} and len(seeds) == 1


@pytest.mark.parametrize("streams", [False, True])
def test_a_picture_is_sent_again_to_the_host_that_takes_over(streams: bool) -> None:
    handle = FakeHandle("a", "b")
    handle.deeds = [dies]
    service, image = front(pool=handle), Picture.of(Image.new("RGB", (64, 128), "red"))

    async def scene() -> None:
        asked = request(image=image, mask_image=Image.new("L", (64, 128)))
        if streams:
            assert [event async for event in service.stream(asked)]
        else:
            await service.generate(asked)

    asyncio.run(scene())
    assert {host for host, _ in handle.calls} == {"a", "b"}
    for _, sent in handle.calls:
        assert sent.image == image and sent.mask_image is not None
        assert (sent.height, sent.width, sent.strength) == (128, 64, 1.0)


def test_a_picture_of_a_size_that_cannot_be_drawn_is_refused_with_one_that_can() -> None:
    handle = FakeHandle("a")
    with pytest.raises(InvalidRequest, match="500x333 pixels.* multiples of 8.* such as 496x336") as refused:
        generate(front(pool=handle), image=Image.new("RGB", (500, 333)))
    assert refused.value.param == "image" and not handle.calls
    generate(front(pool=handle), image=Image.new("RGB", (500, 333)), height=336, width=496)


def test_a_picture_of_any_size_is_edited_in_whole_units() -> None:
    handle = FakeHandle("a")
    handle.facts = replace(FACTS, size_unit=16, terms=Terms(editing=Editing(1)))
    generate(front(pool=handle), image=Image.new("RGB", (500, 333)))
    ((_, sent),) = handle.calls
    assert (sent.width, sent.height) == (496, 320)
    with pytest.raises(InvalidRequest, match="width 504 is not a multiple of 16"):
        generate(front(pool=handle), image=Image.new("RGB", (500, 333)), height=336, width=504)


def test_a_picture_of_any_size_goes_to_a_model_of_which_nothing_is_known_yet() -> None:
    handle = FakeHandle()
    handle.facts = replace(FACTS, size_unit=16, terms=Terms(editing=Editing(1)))
    handle.config = HostConfig(model=ModelSpec(name="some/hub-model"))
    pool = {"name": "hub", "model": "some/hub-model", "min_hosts": 0}
    service = Router(AppConfig.model_validate({"pools": [pool]}), {"hub": handle}, random.Random(0), CREATED)  # type: ignore[dict-item]
    generate(service, image=Image.new("RGB", (500, 333)))
    assert handle.woken and len(handle.calls) == 1


def test_a_request_under_which_every_host_dies_fails_in_the_end() -> None:
    handle = FakeHandle("a", "b", "c", "d")
    handle.deeds = [dies] * 9
    with pytest.raises(GangBroken, match="3 hosts died"):
        generate(front(pool=handle))
    assert len(handle.calls) == 3


def test_what_every_host_refuses_is_refused() -> None:
    handle = FakeHandle("a", "b")
    handle.deeds = [is_full] * 9
    with pytest.raises(QueueFull) as refused:
        generate(front(pool=handle))
    assert refused.value.retry_after_s > 0
    assert {host for host, _ in handle.calls} == {"a", "b"} and len(handle.calls) == 3


def test_full_queues_refuse_without_a_call() -> None:
    handle = FakeHandle("a", waiting=4)
    with pytest.raises(QueueFull) as refused:
        generate(front(pool=handle))
    assert 0 < refused.value.retry_after_s <= 40 and not handle.calls


def test_operators_are_told_of_what_no_host_sees_since_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    monkeypatch.setattr(Refusals, "add", lambda _, model: counted.append(model))
    full, slow, late = FakeHandle("a", waiting=4), FakeHandle("a"), FakeHandle()
    late.wakes_s = 60
    for handle, deadline_s in ((full, None), (slow, 2.0), (late, 0.05)):
        with pytest.raises((QueueFull, DeadlineUnmet)):
            generate(front(pool=handle), deadline_s=deadline_s)
    assert counted == ["builtin:landscapes"] * 3
    taken = FakeHandle("a")
    taken.deeds = [is_full] * 9  # counted by the host
    with pytest.raises(QueueFull):
        generate(front(pool=taken))
    assert len(counted) == 3


def test_who_watches_is_told_how_many_were_refused_in_all() -> None:
    async def scene() -> None:
        for _ in range(2):
            with pytest.raises(QueueFull):
                await service.generate(request())
        async with aclosing(service.watch()) as news:
            assert (await anext(news)).refused == 2

    handle = FakeHandle("a", waiting=4)
    handle.news = SimpleNamespace(remote=lambda *_: Answer(silent()))
    service = front(pool=handle)
    asyncio.run(scene())


def test_a_refusal_is_told_as_it_is_where_metrics_cannot_be_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("the exporter is gone")

    monkeypatch.setattr(metrics.Counter, "inc", fails)
    with pytest.raises(QueueFull):
        generate(front(pool=FakeHandle("a", waiting=4)))


def test_what_is_done_already_fills_no_queue_and_delays_no_deadline() -> None:
    async def scene() -> None:
        for _ in range(12):  # more than the queue holds, one after the other, between two reports
            await service.generate(request(deadline_s=30.0))

    handle = FakeHandle("a")
    service = front(pool=handle)
    asyncio.run(scene())
    assert len(handle.calls) == 12


def test_a_deadline_out_of_reach_is_refused_without_a_call() -> None:
    handle = FakeHandle("a")
    with pytest.raises(DeadlineUnmet) as refused:
        generate(front(pool=handle), deadline_s=2.0)
    assert refused.value.possible_s == pytest.approx(10.0, abs=0.5) and not handle.calls


def test_nobody_is_refused_by_a_guess_and_anybody_once_hosts_have_learnt() -> None:
    handle = FakeHandle("a")
    handle.latency = LatencyModel(model_of().profile.model_copy(update={"guessed": True}))
    generate(front(pool=handle), deadline_s=2.0)
    asyncio.run(front(pool=handle).generate(request(), 9.0))
    assert len(handle.calls) == 2
    for _ in range(3):
        handle.latency.observe(1, 512, 512, 1, 1.0)
    with pytest.raises(DeadlineUnmet):
        generate(front(pool=handle), deadline_s=2.0)
    with pytest.raises(TooLong):
        asyncio.run(front(pool=handle).generate(request(), 9.0))


def test_the_time_that_is_said_to_be_possible_is() -> None:
    for size in range(64, 128, 8):
        with pytest.raises(DeadlineUnmet) as refused:
            generate(front(pool=FakeHandle("a")), deadline_s=1e-6, height=size, width=size)
        said = re.fullmatch(r"deadline_s 1e-06 cannot be met; (\S+) s is possible now", str(refused.value))
        assert said and refused.value.possible_s
        assert 0 <= float(said[1]) - refused.value.possible_s < 0.1


def test_a_deadline_is_kept_by_the_calls_of_the_network_that_it_takes() -> None:
    handle = FakeHandle("a")
    generate(front(pool=handle), deadline_s=6.0, guidance_scale=1.0)  # ten steps of half a second
    handle.facts = replace(FACTS, own_steps=StepCount(2, -1))
    with pytest.raises(DeadlineUnmet) as refused:
        generate(front(pool=handle), deadline_s=12.0)
    assert refused.value.possible_s == pytest.approx(19.0, abs=0.5)
    generate(front(pool=handle), deadline_s=12.0, scheduler="euler")


def test_what_would_be_given_up_before_it_is_done_is_refused_and_says_so() -> None:
    async def scene() -> None:
        for ask in (service.generate(request(), 9.0), anext(service.stream(request(), 9.0))):
            with pytest.raises(TooLong, match=r"about 10 s.* given up after 9 s") as refused:
                await ask
            assert refused.value.possible_s == pytest.approx(10.0, abs=0.5)
        assert not handle.calls
        await service.generate(request(), 9.7)  # within what the prediction is sure of
        await service.generate(request())  # whoever waits for ever

    handle = FakeHandle("a")
    service = front(refresh_s=0.0, pool=handle)
    asyncio.run(scene())
    assert len(handle.calls) == 2 and handle.calls[0][1].deadline_s is None


def test_the_patience_of_a_client_is_held_against_what_is_known_of_the_gang_that_it_would_have() -> None:
    """Nobody has measured a lone worker where none is lent."""
    lent = {"workers": 8, "gang_sizes": (8,)}
    handle = FakeHandle("a")
    handle.config = HostConfig(**lent)  # type: ignore[arg-type]
    profile = model_of().profile
    entries = tuple(entry.model_copy(update={"gang": 8}) for entry in profile.entries)
    handle.latency = LatencyModel(profile.model_copy(update={"entries": entries}))
    pools = AppConfig.model_validate({"pools": [{"name": "pool", **lent}]})
    service = Router(pools, {"pool": handle}, random.Random(0), CREATED)  # type: ignore[dict-item]
    with pytest.raises(TooLong, match="about 10 s"):
        asyncio.run(service.generate(request(), 8.0))


def test_what_is_queued_counts_against_the_patience_of_a_client() -> None:
    handle = FakeHandle("a", waiting=2)
    with pytest.raises(TooLong, match="about 30 s"):
        asyncio.run(front(pool=handle).generate(request(), 25.0))
    asyncio.run(front(pool=handle).generate(request(), 35.0))


def test_a_stream_that_is_taken_over_shows_nothing_twice() -> None:
    async def scene() -> list[Event]:
        return [event async for event in service.stream(request())]

    handle = FakeHandle("a", "b")
    handle.deeds = [dies]
    service = front(pool=handle)
    events = asyncio.run(scene())
    assert sum(isinstance(event, Queued) for event in events) == 1
    assert [event.step for event in events if isinstance(event, Step)] == [1, 2, 3]
    assert [event.index for event in events if isinstance(event, Preview)] == [0, 1, 2]
    assert isinstance(events[-1], Finished)


def test_a_host_that_says_nothing_gets_nothing() -> None:
    async def scene() -> None:
        for _ in range(2):
            await service.generate(request())
        handle.calls.clear()
        handle.silent = {"a"}
        for _ in range(6):
            await service.generate(request())

    handle = FakeHandle("a", "b")
    service = front(pool=handle, refresh_s=0.0)
    asyncio.run(scene())
    assert [host for host, _ in handle.calls] == ["b"] * 6


def test_what_a_host_that_hung_was_sent_is_called_off_when_it_wakes() -> None:
    """Ray itself may ask it only seconds after it has begun, when few steps are done."""

    async def scene() -> None:
        await service.generate(request())
        handle.hung, handle.calls = {handle.calls[0][0]}, []
        for _ in range(8):
            await service.generate(request())
        sent = handle.cancelled.count(*handle.hung)
        assert sent and not handle.called_off
        hung = handle.hung.pop()
        async with asyncio.timeout(5):
            while handle.called_off != [hung] * sent:
                await asyncio.sleep(0.01)

    handle = FakeHandle("a", "b")
    service = front(refresh_s=0.0, accept_s=0.05, pool=handle)
    asyncio.run(scene())


def test_what_a_client_that_left_had_sent_to_a_host_that_hung_is_called_off_too() -> None:
    async def scene() -> None:
        handle.hung = {"a"}
        leaving = asyncio.create_task(service.generate(request()))
        async with asyncio.timeout(5):
            while not handle.calls:
                await asyncio.sleep(0.01)
            leaving.cancel()
            await asyncio.wait([leaving])
            handle.hung = set()
            while handle.called_off != ["a"]:
                await asyncio.sleep(0.01)

    handle = FakeHandle("a")
    service = front(refresh_s=0.0, accept_s=60.0, pool=handle)
    asyncio.run(scene())


def test_a_router_that_starts_while_a_host_hangs_finds_the_others() -> None:
    handle = FakeHandle("a", "b")
    handle.silent = handle.hung = {"a"}
    generate(front(refresh_s=0.0, accept_s=0.05, pool=handle))
    assert [host for host, _ in handle.calls] == ["b"]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_host_that_ends_a_request_with_neither_a_result_nor_an_error_is_not_believed(count: int) -> None:
    async def scene() -> None:
        handle.cuts = {"a": count}
        await service.generate(request())
        handle.cuts = {"a": count}
        events = [event async for event in service.stream(request())]
        assert [type(event) for event in events].count(Finished) == 1 and isinstance(events[-1], Finished)

    handle = FakeHandle("a")
    service = front(pool=handle, refresh_s=0.0)
    asyncio.run(scene())
    assert set(handle.cancelled) == {"a"}


@pytest.mark.parametrize("trouble", ["silent", "fails"])
def test_that_no_host_answers_does_not_mean_that_there_is_none(trouble: str) -> None:
    async def scene() -> None:
        await service.generate(request())
        handle.calls.clear()
        if trouble == "silent":
            handle.silent = {"a"}
        else:
            handle.answer = TaskCancelledError()
        for _ in range(3):
            await service.generate(request())

    handle = FakeHandle("a")
    service = front(pool=handle, refresh_s=0.0)
    asyncio.run(scene())
    assert [host for host, _ in handle.calls] == ["a"] * 3


def test_hosts_are_asked_for_everybody_and_not_for_the_client_that_is_there() -> None:
    async def scene() -> None:
        CALLER.set("somebody")
        for _ in range(3):
            await service.generate(request())

    handle = FakeHandle("a")
    service = front(pool=handle, refresh_s=0.0)
    asyncio.run(scene())
    assert len(handle.callers) >= 3 and set(handle.callers) == {None}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many hosts are compared in each choice from now on."""
    compared: list[int] = []

    def counting(states: Sequence[HostState], *rest: Any) -> Route:
        compared.append(len(states))
        return route(states, *rest)

    monkeypatch.setattr(pool_state, "route", counting)
    return compared


@pytest.mark.parametrize("hosts", [3, 300])
def test_what_a_request_costs_does_not_grow_with_the_fleet(
    hosts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        for _ in range(10):
            await service.generate(request())
        handle.asked.clear()
        await asyncio.sleep(0.05)
        assert not handle.asked, "nobody is asked while nobody comes"
        await service.check_health()

    handle, compared = FakeHandle(*(f"host-{i}" for i in range(hosts))), counted(monkeypatch)
    service = front(refresh_s=0.0, pool=handle)
    asked = handle.asked
    for _ in range(10):
        generate(service)
    assert asked["report"] == sum(compared) == 10 * min(hosts, 8) and len(handle.calls) == 10
    asyncio.run(scene())
    assert asked["ping"] <= 8


def test_a_refusal_is_looked_for_beyond_the_few_and_its_cost_is_bounded_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handle, compared = FakeHandle(*(f"host-{i}" for i in range(300)), waiting=4), counted(monkeypatch)
    with pytest.raises(QueueFull):
        generate(front(pool=handle))
    assert compared == [8, 32] and handle.asked["report"] <= 40
    handle = FakeHandle(*(f"host-{i}" for i in range(32)), waiting=4)
    handle.free = {"host-17"}
    for seed in range(20):
        generate(front(draw=random.Random(seed), pool=handle))
    assert {host for host, _ in handle.calls} == {"host-17"}


def test_a_request_that_comes_soon_after_another_asks_nobody_again() -> None:
    async def scene() -> None:
        await asyncio.gather(*(service.generate(request()) for _ in range(8)))

    handle = FakeHandle(*"abcd")
    service = front(pool=handle)
    asyncio.run(scene())
    assert handle.asked["report"] == 4 and len({host for host, _ in handle.calls}) == 4


def test_a_request_is_cancelled_by_its_router_and_else_at_every_host() -> None:
    async def scene() -> None:
        asked = asyncio.ensure_future(service.generate(request(id="mine")))
        while not handle.calls:
            await asyncio.sleep(0)
        assert await service.cancel("mine") and handle.asked["cancel"] == 1
        with pytest.raises(GenerationCancelled, match="mine.* at step 1"):
            await asked
        handle.asked.clear()
        asked = asyncio.ensure_future(service.generate(request(id="mine")))
        while len(handle.calls) < 2:
            await asyncio.sleep(0)
        assert await other.cancel("mine"), "sent by another router"
        with pytest.raises(GenerationCancelled, match="mine"):
            await asked
        assert not await service.cancel("nobody's")
        assert handle.asked["cancel"] == 2 * 300

    handle = FakeHandle(*(f"host-{i}" for i in range(300)))
    handle.takes_s = 0.05
    service, other = front(pool=handle), front(pool=handle)
    asyncio.run(scene())


def test_a_host_that_hangs_is_waited_for_once_by_the_requests_that_draw_it() -> None:
    async def scene() -> None:
        await service.generate(request())
        handle.deaf = {"host-0"}
        for _ in range(5):
            await service.generate(request())

    handle = FakeHandle(*(f"host-{i}" for i in range(8)))
    service = front(refresh_s=0.0, pool=handle)
    asyncio.run(scene())
    assert all(host != "host-0" for host, _ in handle.calls[1:])


def test_a_request_waits_for_a_host_that_hangs_no_longer_than_for_its_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits_s: list[float] = []
    wait = asyncio.wait

    async def noting(tasks: Any, *, timeout: float, **how: Any) -> Any:
        waits_s.append(timeout)
        return await wait(tasks, timeout=timeout, **how)

    async def scene() -> None:
        await service.generate(request())
        handle.deaf = {"a"}
        monkeypatch.setattr(asyncio, "wait", noting)
        await service.generate(request())

    handle = FakeHandle("a", "b")
    service = front(refresh_s=0.0, pool=handle)
    asyncio.run(scene())
    assert len(waits_s) == 2 and sum(waits_s) < 1.1 * pool_client.PATIENCE_S


def test_a_host_that_dies_while_others_are_asked_is_not_compared() -> None:
    """It was drawn, and another request found it dead before the reports of another pool were there."""

    async def scene() -> None:
        one, _ = service._clients
        await one.look(8)
        alive.deaf = {"b"}
        asked = asyncio.ensure_future(service.generate(request()))
        while not alive.asked["report"]:
            await asyncio.sleep(0)
        one.state.lost("a", time.monotonic())
        dies.hosts, alive.deaf = [], set()
        assert (await asked).images

    dies, alive = FakeHandle("a"), FakeHandle("b", waiting=4)
    service = front(dies=dies, alive=alive)
    asyncio.run(scene())
    assert [host for host, _ in dies.calls] == ["woken-0"] and not alive.calls


def test_an_adapter_that_is_to_do_nothing_decides_for_no_host() -> None:
    async def scene() -> None:
        client = service._clients[0]
        await client.look(20)
        state = client.state.hosts["host-19"]
        client.state.hosts["host-19"] = replace(state, adapters=frozenset({"ink"}))
        loras = [{"name": "ink"}, {"name": "neon", "scale": 0.0}]
        for _ in range(10):
            (drawn,) = (await service._look([client], 1, request(loras=loras))).values()
            assert drawn == ["host-19"]

    service = front(pool=FakeHandle(*(f"host-{i}" for i in range(20))))
    asyncio.run(scene())


def test_another_host_gives_no_news_of_one_that_has_left() -> None:
    """Serve hands a call for a host that it has no more to any other."""

    async def told() -> str:
        return "b's"

    async def scene() -> None:
        client = front(pool=handle)._clients[0]
        assert await client.news("b", 0) == "b's"  # type: ignore[comparison-overlap]
        assert await client.news("a", 0) is None

    handle = FakeHandle("b")
    handle.news = SimpleNamespace(remote=lambda *_: Answer(told()))
    asyncio.run(scene())


def test_a_host_that_answers_when_it_has_left_is_not_taken_back() -> None:
    async def scene() -> set[str]:
        await service.generate(request())
        handle.hosts = ["a"]
        await service.generate(request())
        handle.deaf.clear()
        await asyncio.sleep(0.05)
        return service._clients[0].state.hosts.keys() | service._clients[0].state.silent

    handle = FakeHandle("a", "b")
    handle.deaf = {"b"}
    service = front(pool=handle)
    assert asyncio.run(scene()) == {"a"}


def test_a_pool_without_hosts_is_woken_when_there_is_no_other() -> None:
    handle = FakeHandle()
    generate(front(pool=handle))
    assert handle.woken == 1 and [host for host, _ in handle.calls] == ["woken-0"]


def test_a_pool_without_hosts_is_woken_when_the_queues_of_the_others_are_full() -> None:
    asleep, full = FakeHandle(), FakeHandle("a", waiting=4)
    generate(front(asleep=asleep, full=full))
    assert asleep.woken == len(asleep.calls) == 1 and not full.calls
    asleep, free = FakeHandle(), FakeHandle("a")
    generate(front(asleep=asleep, free=free))
    assert len(free.calls) == 1 and not asleep.calls and not asleep.woken


def test_no_more_wait_for_a_first_host_than_its_queue_may_hold() -> None:
    handle = FakeHandle()
    handle.wakes_s = 0.2
    service = front(pool=handle)

    async def scene() -> list[GenerationResult | BaseException]:
        return await asyncio.gather(*(service.generate(request()) for _ in range(5)), return_exceptions=True)

    outcomes = asyncio.run(scene())
    assert sum(isinstance(outcome, QueueFull) for outcome in outcomes) == 3


def test_a_deadline_runs_while_a_pool_without_hosts_starts() -> None:
    late = FakeHandle()
    late.wakes_s = 60
    began = time.monotonic()
    with pytest.raises(DeadlineUnmet, match="had no host"):
        generate(front(pool=late), deadline_s=0.1)
    assert time.monotonic() - began < 5 and not late.calls
    slow = FakeHandle()
    slow.wakes_s = 0.3
    generate(front(pool=slow), deadline_s=20)
    ((_, sent),) = slow.calls
    assert sent.deadline_s is not None and sent.deadline_s <= 20 - 0.3
    with pytest.raises(DeadlineUnmet, match="is possible"):  # ten steps of a second each
        slow.hosts.clear()
        generate(front(pool=slow), deadline_s=9.7)
    assert len(slow.calls) == 1


@pytest.mark.parametrize("streams", [False, True])
def test_what_waits_for_its_first_host_can_be_cancelled_by_id(streams: bool) -> None:
    async def scene() -> None:
        async def ask(name: str) -> GenerationResult:
            if not streams:
                return await service.generate(request(id=name))
            async for event in service.stream(request(id=name)):
                if isinstance(event, Finished):
                    return event.result
            raise AssertionError("a stream ends with Finished")

        one, other = asyncio.ensure_future(ask("one")), asyncio.ensure_future(ask("other"))
        while not await service.cancel("one"):
            await asyncio.sleep(0)
        with pytest.raises(GenerationCancelled, match="one"):
            await one
        assert not await service.cancel("one") and not await service.cancel("nobody's")
        assert (await other).id == "other"
        assert not await service.call_off("other")

    handle = FakeHandle()
    handle.wakes_s = 0.1
    service = front(pool=handle)
    asyncio.run(scene())
    assert [sent.id for _, sent in handle.calls] == ["other"]


def test_what_has_lost_its_host_can_be_cancelled_by_id_before_it_has_another() -> None:
    async def scene() -> None:
        asked = asyncio.ensure_future(service.generate(request(id="mine")))
        while not handle.calls:
            await asyncio.sleep(0)
        handle.deaf = {"a", "b"}  # so that the next host takes a while to be found
        while not handle.cancelled:
            await asyncio.sleep(0)
        assert await service.cancel("mine")
        await asyncio.sleep(0)
        assert await service.call_off("mine"), "it is being ended already, and may be called off twice"
        with pytest.raises(GenerationCancelled):
            await asked
        assert len(handle.calls) == 1 and not await service.call_off("mine")

    handle = FakeHandle("a", "b")
    handle.deeds = [dies]
    service = front(refresh_s=0.0, pool=handle)
    asyncio.run(scene())


def test_a_host_that_dies_when_its_picture_has_arrived_is_nobodys_trouble() -> None:
    class Dying(FakeHandle):
        def _stream(self, host: str, request: GenerationRequest, router: str | None) -> Stream:
            async def events() -> AsyncGenerator[Event, None]:
                yield Queued(request.id, 0, 0.0)
                yield Finished(request.id, self._do(host, request))
                raise ActorDiedError

            return Stream(events(), lambda: self.cancelled.append(host))

    async def scene() -> list[Event]:
        return [event async for event in front(pool=handle).stream(request(id="mine"))]

    handle = Dying("a", "b")
    assert [type(event) for event in asyncio.run(scene())] == [Queued, Finished]
    assert len(handle.calls) == 1


def test_an_id_is_taken_while_it_waits_for_its_first_host() -> None:
    async def scene() -> list[GenerationResult | BaseException]:
        asks = (service.generate(request(id="twin")) for _ in range(2))
        return await asyncio.gather(*asks, return_exceptions=True)

    handle = FakeHandle()
    handle.wakes_s = 0.05
    service = front(pool=handle)
    result, error = asyncio.run(scene())
    assert isinstance(result, GenerationResult) and isinstance(error, InvalidRequest) and error.param == "id"


def test_nobody_is_started_for_a_client_that_has_left() -> None:
    async def scene() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(service.generate(request()), 0.02)
        await asyncio.sleep(0.1)
        assert handle.woken == 0 and not handle.calls
        await service.generate(request())

    handle = FakeHandle()
    handle.wakes_s = 0.05
    service = front(pool=handle)
    asyncio.run(scene())
    assert handle.woken == 1 and len(handle.calls) == 1


def test_hosts_that_come_up_and_are_gone_are_not_waited_for_without_end() -> None:
    handle = FakeHandle()
    handle.lost_at_start, handle.answer = True, TaskCancelledError()
    with pytest.raises(NotEnoughDevices, match="come up and are gone"):
        generate(front(refresh_s=0.0, pool=handle))


def test_hosts_of_before_that_have_another_model_get_nothing_and_others_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool_client, "OTHERS_S", 0.01)
    handle = FakeHandle("a", "b")
    handle.others = {"a", "b"}
    service = front(pool=handle)

    async def scene() -> None:
        drawn = asyncio.ensure_future(service.generate(request()))
        await asyncio.sleep(0.1)
        assert not drawn.done() and not handle.calls
        handle.hosts = ["new", "b"]
        await drawn
        await service.generate(request())

    asyncio.run(scene())
    assert [host for host, _ in handle.calls] == ["new", "new"]


@pytest.mark.parametrize("streams", [False, True])
def test_what_has_lost_its_host_to_one_of_another_model_is_unavailable_and_not_the_clients_mistake(
    streams: bool,
) -> None:
    handle = FakeHandle("a")
    service = front(pool=handle)

    def is_replaced(host: str, request: GenerationRequest) -> Any:
        handle.hosts, handle.others = ["new"], {"new"}
        raise ActorDiedError

    async def scene() -> None:
        with pytest.raises(NotEnoughDevices, match="pool pool has another model by now"):
            if streams:
                assert [event async for event in service.stream(request())]
            else:
                await service.generate(request())

    handle.deeds = [is_replaced]
    asyncio.run(scene())
    assert [host for host, _ in handle.calls] == ["a"]


def test_a_host_of_another_model_that_gets_a_request_instead_of_one_that_left_does_not_end_it() -> None:
    def is_anothers(host: str, request: GenerationRequest) -> Any:
        raise ModelNotFound("no model 'm' here; this host has 'other'")

    handle = FakeHandle("a", "b")
    handle.deeds = [is_anothers]
    generate(front(pool=handle))
    assert {host for host, _ in handle.calls} == {"a", "b"}
    handle.deeds = [is_anothers] * 3
    with pytest.raises(NotEnoughDevices, match="3 hosts failed"):
        generate(front(refresh_s=0.0, pool=handle))


@pytest.mark.parametrize("streams", [False, True])
def test_a_host_that_accepts_nothing_is_given_up_and_another_gets_it(streams: bool) -> None:
    async def scene() -> None:
        for _ in range(4):
            if streams:
                assert [isinstance(e, Finished) async for e in service.stream(request())][-1]
            else:
                await service.generate(request())

    handle = FakeHandle("a", "b")
    handle.hung = {"a"}
    service = front(accept_s=0.05, pool=handle)
    asyncio.run(scene())
    assert handle.cancelled == ["a"] * len(handle.cancelled) and len(handle.cancelled) == 1
    assert handle.calls[-1][0] == "b"


def test_what_a_host_has_accepted_may_take_long() -> None:
    handle = FakeHandle("a", "b")
    handle.takes_s = 0.3
    generate(front(accept_s=0.05, pool=handle))
    assert len(handle.calls) == 1 and not handle.cancelled


def test_what_no_host_accepts_is_unavailable_and_stopped_everywhere() -> None:
    handle = FakeHandle(*"abcd")
    handle.hung = set("abcd")
    with pytest.raises(NotEnoughDevices, match="did not accept"):
        generate(front(accept_s=0.02, pool=handle))
    assert len(handle.calls) == 3 and sorted(host for host, _ in handle.calls) == sorted(handle.cancelled)


def test_what_no_pool_can_do_is_refused() -> None:
    service = front(pool=FakeHandle("a"))
    with pytest.raises(ModelNotFound, match="builtin:landscapes"):
        generate(service, model="other")
    with pytest.raises(InvalidRequest, match="gang_size 4"):
        generate(service, gang_size=4)


def test_a_gang_size_wakes_the_pool_that_lends_it() -> None:
    pools = [{"name": f"gangs-of-{n}", "workers": n, "gang_sizes": [n], "min_hosts": 0} for n in (1, 2, 4)]
    handles = {str(pool["name"]): FakeHandle() for pool in pools}
    for n in (1, 2, 4):
        handles[f"gangs-of-{n}"].config = HostConfig(workers=n, gang_sizes=(n,))
    service = Router(AppConfig.model_validate({"pools": pools}), handles, random.Random(0), CREATED)  # type: ignore[arg-type]
    generate(service, gang_size=4)
    assert {name: len(handle.calls) for name, handle in handles.items()} == {
        "gangs-of-1": 0,
        "gangs-of-2": 0,
        "gangs-of-4": 1,
    }
    assert [handle.woken for handle in handles.values()] == [0, 0, 1]


def test_a_refusal_names_what_the_pools_of_a_model_allow_together() -> None:
    common = {"min_hosts": 0, "workers": 2}
    pools = [
        {"name": f"gangs-of-{n}", "gang_sizes": [n], "limits": {"max_steps": 10 * n}, **common}
        for n in (1, 2)
    ]
    handles = {str(pool["name"]): FakeHandle() for pool in pools}
    service = Router(AppConfig.model_validate({"pools": pools}), handles, random.Random(0), CREATED)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=r"gang_size 4 is not lent here; use one of \[1, 2\]"):
        generate(service, gang_size=4)
    steps = GenerationRequest(prompt="a lake", num_inference_steps=21)
    with pytest.raises(InvalidRequest, match="num_inference_steps 21 is above the limit of 20"):
        asyncio.run(service.generate(steps))


def test_a_model_is_drawn_by_its_other_names_too_and_by_its_pools_defaults() -> None:
    async def scene() -> None:
        names = [card.id for card in service.models()]
        assert names == ["builtin:landscapes", "dall-e-3"]
        assert service.models()[1].alias_of == "builtin:landscapes"
        assert service.models()[1].defaults.num_inference_steps == 4
        for model in ("dall-e-3", "builtin:landscapes", None):
            await service.generate(GenerationRequest(prompt="x", model=model))
        async for _ in service.stream(GenerationRequest(prompt="x", model="dall-e-3", guidance_scale=7.0)):
            pass
        with pytest.raises(ModelNotFound):
            await service.generate(GenerationRequest(prompt="x", model="dall-e-2"))

    handle = FakeHandle("a")
    defaults = {"num_inference_steps": 4, "guidance_scale": 0.0}
    pool = {"name": "pool", "defaults": defaults, "limits": {"max_steps": 8}}
    handle.config = HostConfig(defaults=Defaults(**defaults), limits=Limits(max_steps=8))  # type: ignore[arg-type]
    config = {"pools": [pool], "aliases": {"dall-e-3": "builtin:landscapes"}}
    service = Router(AppConfig.model_validate(config), {"pool": handle}, random.Random(0), CREATED)  # type: ignore[dict-item]
    asyncio.run(scene())
    assert [sent.model for _, sent in handle.calls] == ["builtin:landscapes"] * 2 + [
        None,
        "builtin:landscapes",
    ]
    assert [sent.num_inference_steps for _, sent in handle.calls] == [4] * 4
    assert [sent.guidance_scale for _, sent in handle.calls] == [0.0] * 3 + [7.0]


def test_health_is_whether_workers_answer() -> None:
    asyncio.run(front(pool=FakeHandle("a")).check_health())
    asyncio.run(front(pool=FakeHandle()).check_health())  # it starts when asked
    broken = FakeHandle("a")
    broken.workers = 0
    with pytest.raises(GangBroken, match="no worker"):
        asyncio.run(front(pool=broken).check_health())
    config = AppConfig.model_validate({"pools": [{"name": "pool"}]})
    with pytest.raises(NotEnoughDevices, match="no host"):
        asyncio.run(Router(config, {"pool": FakeHandle()}, random.Random(0), CREATED).check_health())  # type: ignore[dict-item]


def test_models_are_known_before_any_host_is_up() -> None:
    async def scene() -> list[ModelCard]:
        return front(pool=FakeHandle()).models()

    (card,) = asyncio.run(scene())
    assert card.id == "builtin:landscapes" and card.default_size == (512, 512)
    assert card.created == CREATED


def test_a_card_names_what_is_refused_in_the_words_of_the_refusal() -> None:
    handle = FakeHandle()

    async def scene() -> None:
        service = front(pool=handle)
        lacks = service.models()[0].lacks
        assert lacks.keys() == {"prompt_3", "negative_prompt_3", "references"}, "by its folder"
        handle.hosts, handle.facts = ["a"], replace(FACTS, terms=Terms(lacks={"prompt_2": "there is one"}))
        with pytest.raises(InvalidRequest, match="^prompt_2: there is one; leave it out$"):
            await service.generate(GenerationRequest(prompt="x", prompt_2="y"))
        assert service.models()[0].lacks == {"prompt_2": "there is one"}, "hosts know better than folders"

    asyncio.run(scene())
    assert not handle.calls


def test_a_model_whose_size_no_host_has_told_yet_is_there_too() -> None:
    async def scene() -> list[ModelCard]:
        pools = [
            {"name": "hub", "model": "some/hub-model", "min_hosts": 0, "gang_sizes": [1], "limits": few},
            {"name": "more", "model": "some/hub-model", "min_hosts": 0, "workers": 2},
            {"name": "own", "min_hosts": 0},
        ]
        handles = {str(pool["name"]): FakeHandle() for pool in pools}
        return Router(AppConfig.model_validate({"pools": pools}), handles, random.Random(0), CREATED).models()  # type: ignore[arg-type]

    few = {"max_images": 1, "min_side": 128}
    hub, own = asyncio.run(scene())
    assert (hub.id, hub.default_size, own.default_size) == ("some/hub-model", None, (512, 512))
    assert hub.gang_sizes == (1, 2) and hub.limits == Limits(), "what at least one of its pools allows"


def test_sizes_of_a_model_are_its_familys_also_before_any_host_is_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = Sizes((512, 512), unit=16, latent_row=8)
    monkeypatch.setitem(
        PIPELINES, "StableDiffusionXL", replace(PIPELINES["StableDiffusionXL"], sizes=lambda config: sizes)
    )
    handle = FakeHandle()

    async def scene() -> None:
        service = front(pool=handle)
        assert service.models()[0].size_unit == 16
        await service.generate(GenerationRequest(prompt="x", height=72, width=64))

    with pytest.raises(InvalidRequest, match="height 72 is not a multiple of 16; use 64 or 80"):
        asyncio.run(scene())
    assert not handle.calls and not handle.woken, "no host was started for it"


def test_hosts_say_the_unit_of_a_model_whose_folder_is_elsewhere() -> None:
    facts = replace(FACTS, size_unit=16)
    with pytest.raises(InvalidRequest, match="width 72 is not a multiple of 16; use 64 or 80"):
        admit(GenerationRequest(prompt="x", height=64, width=72), HostConfig(), facts)


def test_a_model_that_no_host_can_serve_has_no_sizes(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    assert sizes_of(ModelSpec(name=str(tmp_path))) is None


def test_too_few_workers_are_no_full_queue() -> None:
    handle = FakeHandle("a")
    handle.gang_sizes = ()
    with pytest.raises(NotEnoughDevices, match="workers are down"):
        generate(front(pool=handle))


def test_what_serve_cannot_run_is_unavailable() -> None:
    def undeployed(host: str, request: GenerationRequest) -> Any:
        raise DeploymentUnavailableError(DeploymentID("pool", "app"))

    handle = FakeHandle("a")
    handle.deeds = [undeployed]
    with pytest.raises(NotEnoughDevices, match="deleted, or could not be started; `serve status`"):
        generate(front(pool=handle))
    asleep = FakeHandle()
    asleep.undeployed = True
    with pytest.raises(NotEnoughDevices, match="deleted, or could not be started; `serve status`"):
        generate(front(pool=asleep))


def test_models_follow_the_limits_that_hosts_have_now() -> None:
    async def scene() -> list[int]:
        service = front(pool=handle)
        first = service.models()[0].limits.max_steps
        while service.models()[0].limits.max_steps == first:
            await asyncio.sleep(0)
        return [first, service.models()[0].limits.max_steps]

    handle = FakeHandle("a")
    handle.config = HostConfig(limits=Limits(max_steps=3))
    assert asyncio.run(scene()) == [200, 3]


LOST: list[BaseException] = [
    ObjectLostError("00", "address", "site"),
    OwnerDiedError("00", "address", "site"),
    RaySystemError("the object store is gone"),
    ActorUnavailableError("the network is gone", None),
    TaskCancelledError(),
    RequestCancelledError("r"),
    RayServeException("a replica is gone"),
    asyncio.CancelledError(),  # as Serve says of a call that somebody else has cancelled
]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
def test_what_ray_or_serve_loses_on_the_way_is_done_by_another_host(
    error: BaseException, streams: bool
) -> None:
    def loses(host: str, request: GenerationRequest) -> Any:
        raise error

    async def scene() -> None:
        if streams:
            events = [event async for event in service.stream(request())]
            assert isinstance(events[-1], Finished)
        else:
            assert (await service.generate(request())).images

    handle = FakeHandle("a", "b")
    handle.deeds = [loses]
    service = front(pool=handle)
    asyncio.run(scene())
    assert {host for host, _ in handle.calls} == {"a", "b"} and len(
        {sent.seed for _, sent in handle.calls}
    ) == 1
    assert len(handle.cancelled) == 1, "what the first host may still draw is for nobody"


def test_what_is_lost_on_the_way_from_every_host_is_unavailable() -> None:
    def loses(host: str, request: GenerationRequest) -> Any:
        raise ObjectLostError("00", "address", "site")

    handle = FakeHandle("a", "b")
    handle.deeds = [loses] * 9
    with pytest.raises(NotEnoughDevices, match="3 hosts failed.*ObjectLostError"):
        generate(front(pool=handle, refresh_s=0.0))


def test_a_bound_of_serves_own_is_a_full_queue() -> None:
    def is_too_much(host: str, request: GenerationRequest) -> Any:
        raise BackPressureError(5, 5, retry_after_s=7.0)

    handle = FakeHandle("a")
    handle.deeds = [is_too_much] * 9
    with pytest.raises(QueueFull) as refused:
        generate(front(pool=handle))
    assert refused.value.retry_after_s > 0


@pytest.mark.parametrize("error", [asyncio.CancelledError(), BackPressureError(5, 5)])
def test_a_question_that_serve_loses_ends_nothing_but_itself(error: BaseException) -> None:
    async def lost(*_: Any) -> Any:
        raise error

    async def scene() -> None:
        await service.generate(request())
        handle.report = handle.cancel = handle.ping = SimpleNamespace(remote=lambda *_: Answer(lost()))
        assert (await service.generate(request())).images
        assert not await service.cancel("nobody's")
        with pytest.raises(GangBroken, match="no worker"):
            await service.check_health()

    handle = FakeHandle("a")
    service = front(pool=handle, refresh_s=0.0)
    asyncio.run(scene())


def test_a_call_to_wake_a_pool_that_serve_loses_is_made_again() -> None:
    async def lost() -> Any:
        raise asyncio.CancelledError

    async def scene() -> None:
        tell, calls = handle.report.remote, 0

        def remote(*asked: Any) -> Answer:
            nonlocal calls
            calls += 1
            return Answer(lost()) if calls == 1 else tell(*asked)

        handle.report = SimpleNamespace(remote=remote)
        assert (await service.generate(request())).images

    handle = FakeHandle()
    service = front(pool=handle)
    asyncio.run(scene())


class Deaf(FakeHandle):
    """One host, `a`, that does not hear the first request for it: that is lost, or heard late.

    It refuses an id that it has, and stops a request after its step, of `step_s`.
    """

    def __init__(self, heard_late: bool, step_s: float = 0.0) -> None:
        super().__init__("a")
        self.heard_late, self.step_s = heard_late, step_s
        self.jobs: dict[str, asyncio.Event] = {}
        self.hears = asyncio.Event()
        self.came = 0

    def _generate(self, host: str, request: GenerationRequest, router: str | None) -> Stream:
        self.came += 1
        first = self.came == 1

        async def draw() -> None:
            stop = self.jobs[request.id]
            try:
                async with asyncio.timeout(self.takes_s):
                    await stop.wait()
                await asyncio.sleep(self.step_s)
            except TimeoutError:
                return
            finally:
                del self.jobs[request.id]
            raise GenerationCancelled(f"request {request.id} was cancelled")

        async def begin_late() -> None:
            await self.hears.wait()
            self.jobs[request.id] = asyncio.Event()
            with suppress(GenerationCancelled):
                await draw()

        async def events() -> AsyncGenerator[Event, None]:
            if first:
                if self.heard_late:
                    self.late = asyncio.create_task(begin_late())
                await asyncio.Event().wait()
            if request.id in self.jobs:
                raise InvalidRequest(f"request {request.id!r} is already being worked on", "id")
            self.jobs[request.id] = asyncio.Event()
            yield Queued(request.id, 0, 0.0)
            await draw()
            yield Finished(request.id, result_of(request))

        return Stream(events(), lambda: None)

    async def _cancel(self, host: str, request_id: str) -> bool:
        await self.hears.wait()
        if request_id in self.jobs:
            self.jobs[request_id].set()
        return request_id in self.jobs


@pytest.mark.parametrize(("heard_late", "step_s"), [(False, 0.0), (True, 0.0), (True, 0.3)])
def test_the_only_host_gets_it_again_when_it_wakes_and_nothing_of_before_is_in_the_way(
    heard_late: bool, step_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was sent first is called off for a while: by the same name as what is sent then."""

    async def scene() -> None:
        monkeypatch.setattr(pool_client, "CALL_OFF_S", 0.02)
        handle = Deaf(heard_late, step_s)
        handle.takes_s = 1.0
        service = front(refresh_s=0.0, accept_s=0.3, pool=handle)
        asyncio.get_running_loop().call_later(0.35, handle.hears.set)
        assert (await service.generate(request(id="mine"))).images
        assert not handle.jobs

    asyncio.run(scene())


def test_what_was_called_off_takes_nothing_of_the_same_name_with_it_that_comes_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A program that gave up waiting asks for the same again, before the host knew of it."""

    async def scene() -> None:
        monkeypatch.setattr(pool_client, "CALL_OFF_S", 0.005)
        handle = Deaf(heard_late=False)
        handle.takes_s = 0.2
        handle.hears.set()
        service, asked = front(refresh_s=0.0, accept_s=60.0, pool=handle), request(id="mine")
        leaving = asyncio.create_task(service.generate(asked))
        while not handle.came:
            await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
        assert (await service.generate(asked)).images

    asyncio.run(scene())


def test_nobody_is_started_to_hear_that_a_request_is_called_off() -> None:
    async def scene() -> None:
        leaving = asyncio.create_task(service.generate(request()))
        while not handle.calls:
            await asyncio.sleep(0)
        handle.hosts.clear()  # before it began: Serve has the request wait for another
        leaving.cancel()
        await asyncio.wait([leaving])
        await asyncio.sleep(0.05)
        assert not handle.asked["cancel"]

    handle = FakeHandle("a")
    handle.hung = {"a"}
    service = front(accept_s=60.0, pool=handle)
    asyncio.run(scene())


@pytest.mark.parametrize("streams", [False, True])
def test_an_id_is_taken_until_its_request_is_over(streams: bool) -> None:
    async def ask() -> bool:
        if streams:
            return [isinstance(event, Finished) async for event in service.stream(request(id="twin"))][-1]
        return bool((await service.generate(request(id="twin"))).images)

    async def scene() -> None:
        first = asyncio.create_task(ask())
        while not handle.asked["report"]:
            await asyncio.sleep(0)
        with pytest.raises(InvalidRequest, match="'twin' is already being worked on") as refused:
            await ask()
        assert refused.value.param == "id"
        assert await first and await ask(), "and free again"

    handle = FakeHandle("a", "b")
    handle.takes_s = 0.05
    service = front(pool=handle, refresh_s=0.0)
    asyncio.run(scene())
    assert len(handle.calls) == 2


@pytest.mark.parametrize("when", ["on its way", "with a host that drains", "with a host that dies then"])
@pytest.mark.parametrize("streams", [False, True])
def test_a_request_that_was_cancelled_is_cancelled(streams: bool, when: str) -> None:
    async def ask() -> None:
        if streams:
            async for _ in service.stream(request(id="mine")):
                pass
        else:
            await service.generate(request(id="mine"))

    async def scene() -> None:
        asked = asyncio.create_task(ask())
        while "mine" not in service._under_way or not handle.asked["report"]:
            await asyncio.sleep(0)
        await asyncio.sleep(0.02)
        if when == "with a host that drains":
            handle.hosts.clear()  # Serve sends it nothing more, and lets it finish
        assert await service.cancel("mine")
        if when == "with a host that drains":
            assert not handle.asked["cancel"], "another would be asked in its place, or waited for"
        arrived.set()
        if when == "with a host that dies then":
            dying.set()
        with pytest.raises(GenerationCancelled, match="mine"):
            await asked
        assert len(handle.cancelled) == 1 and len(sent) == 1
        handle.hosts.clear()
        assert not await service.cancel("mine")

    class Slow(FakeHandle):
        def _stream(self, host: str, request: GenerationRequest, router: str | None) -> Stream:
            return self._generate(host, request, router)

        def _generate(self, host: str, request: GenerationRequest, router: str | None) -> Stream:
            async def events() -> AsyncGenerator[Event, None]:
                sent.append(host)
                if when == "on its way":
                    await arrived.wait()
                self.calls.append((host, request))
                yield Queued(request.id, 0, 0.0)
                await dying.wait()
                if when == "with a host that dies then":
                    raise ActorDiedError
                yield Finished(request.id, result_of(request))

            return Stream(events(), lambda: self.cancelled.append(host))

    handle, sent, arrived, dying = Slow("a"), list[str](), asyncio.Event(), asyncio.Event()
    service = front(pool=handle)
    asyncio.run(scene())


def test_a_stream_that_nobody_reads_is_cancelled_all_the_same() -> None:
    async def scene() -> None:
        events = service.stream(request(id="mine"))
        await anext(events)
        assert await service.cancel("mine")
        with pytest.raises(GenerationCancelled):
            await anext(events)

    handle = FakeHandle("a")
    service = front(pool=handle)
    asyncio.run(scene())
