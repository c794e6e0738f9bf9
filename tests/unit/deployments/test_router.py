"""Where requests go when hosts are full, die or are not there."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from ray.exceptions import ActorDiedError, TaskCancelledError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from deployments.config import AppConfig
from deployments.router import Router
from deployments.state import HostReport
from distriray.errors import (
    DeadlineUnmet,
    GangBroken,
    InvalidRequest,
    ModelNotFound,
    NotEnoughDevices,
    QueueFull,
)
from distriray.events import Event, Finished, Preview, Queued, Step
from distriray.gang.config import HostConfig
from distriray.requests import GenerationRequest, GenerationResult, Limits, Segment, Timings
from distriray.service import ModelCard

from ..gang.fleet import CALLER
from .test_state import ask as view_of
from .test_state import report

CREATED = 1_800_000_000
Deed = Callable[[str | None, GenerationRequest], Any]


class FakeHandle:
    """A Serve handle of a pool: its hosts answer as told, and `calls` says what they were asked."""

    def __init__(self, *hosts: str, waiting: int = 0) -> None:
        self.hosts = list(hosts)
        self.waiting = waiting
        self.config = HostConfig()
        self.silent: set[str] = set()
        self.answer: Exception | None = None
        self.callers: list[str | None] = []
        self.gang_sizes: tuple[int, ...] = (1,)
        self.workers, self.takes_s = 1, 0.0
        self.report = SimpleNamespace(remote=self._tell)
        self.deeds: list[Deed] = []
        self.calls: list[tuple[str | None, GenerationRequest]] = []
        self.generate = SimpleNamespace(remote=self._generate)
        self.stream = SimpleNamespace(remote=self._stream)

    def options(self, **_: Any) -> FakeHandle:
        return self

    def broadcast(self, method: str, *args: Any) -> Any:
        self.callers.append(CALLER.get())

        async def results_async(**_: Any) -> list[Any]:
            if self.silent:
                raise TimeoutError
            if self.answer is not None:
                return [self.answer for _ in self.hosts]
            return [self._report(host) if method == "report" else self.workers for host in self.hosts]

        return SimpleNamespace(results_async=results_async)

    def _report(self, host: str) -> HostReport:
        requests = (view_of(f"r{i}", 100.0) for i in range(self.waiting))
        told = report(host, *requests, max_queue=4)
        assert told.knowledge is not None
        knowledge = replace(told.knowledge, config=self.config)
        return replace(told, knowledge=knowledge, state=replace(told.state, gang_sizes=self.gang_sizes))

    async def _tell(self, host: str, editions: Mapping[str, str]) -> HostReport:
        if host in self.silent:
            raise TimeoutError
        return self._report(host)

    def _do(self, host: str | None, request: GenerationRequest) -> Any:
        self.calls.append((host, request))
        return self.deeds.pop(0)(host, request) if self.deeds else result_of(request)

    def _generate(self, host: str | None, request: GenerationRequest) -> Awaitable[GenerationResult]:
        class Response:
            def __await__(response) -> Generator[Any, None, GenerationResult]:
                yield from asyncio.sleep(self.takes_s).__await__()
                return self._do(host, request)

        return Response()

    def _stream(self, host: str | None, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        async def events() -> AsyncGenerator[Event, None]:
            for step in range(1, 4):
                if step == 1:
                    yield Queued(request.id, 0, 0.0)
                if step == 3:
                    made = self._do(host, request)
                yield Step(request.id, step, 3, 1, 0.0)
                yield Preview(request.id, step, step - 1, Image.new("RGB", (8, 8)))
            yield Finished(request.id, made)

        class Response:
            def __init__(self) -> None:
                self.events = events()

            def __aiter__(self) -> AsyncGenerator[Event, None]:
                return self.events

            def cancel(self) -> None:
                pass

        return Response()  # type: ignore[return-value]


def result_of(request: GenerationRequest) -> GenerationResult:
    timings = Timings(queued_s=0, prepare_s=0, denoise_s=0, decode_s=0, total_s=0)
    segment = Segment(workers=(0,), first_step=0, last_step=3, seconds=0, sent_at=0, formed_at=0, left_at=0)
    return GenerationResult(
        id=request.id, model="m", height=512, width=512, seeds=[request.seed or 0], timings=timings,
        segments=[segment], images=[Image.new("RGB", (8, 8))],
    )  # fmt: skip


def dies(host: str | None, request: GenerationRequest) -> Any:
    raise ActorDiedError()


def is_full(host: str | None, request: GenerationRequest) -> Any:
    raise QueueFull("full", 3.0)


def front(refresh_s: float = 1000.0, **handles: FakeHandle) -> Router:
    pools = [{"name": name, "min_hosts": 0, "max_queue": 2} for name in handles]
    config = AppConfig.model_validate({"pools": pools, "router": {"refresh_s": refresh_s}})
    return Router(config, handles, random.Random(0), CREATED)  # type: ignore[arg-type]


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


def test_a_pool_without_hosts_is_woken_when_there_is_no_other() -> None:
    handle = FakeHandle()
    generate(front(pool=handle))
    assert [host for host, _ in handle.calls] == [None]


def test_a_pool_without_hosts_is_woken_when_the_queues_of_the_others_are_full() -> None:
    asleep, full = FakeHandle(), FakeHandle("a", waiting=4)
    generate(front(asleep=asleep, full=full))
    assert len(asleep.calls) == 1 and not full.calls
    asleep, free = FakeHandle(), FakeHandle("a")
    generate(front(asleep=asleep, free=free))
    assert len(free.calls) == 1 and not asleep.calls


def test_no_more_wait_for_a_first_host_than_its_queue_may_hold() -> None:
    handle = FakeHandle()
    handle.takes_s = 0.2
    service = front(pool=handle)

    async def scene() -> list[GenerationResult | BaseException]:
        return await asyncio.gather(*(service.generate(request()) for _ in range(5)), return_exceptions=True)

    outcomes = asyncio.run(scene())
    assert sum(isinstance(outcome, QueueFull) for outcome in outcomes) == 3


def test_what_no_pool_can_do_is_refused() -> None:
    service = front(pool=FakeHandle("a"))
    with pytest.raises(ModelNotFound, match="builtin:landscapes"):
        generate(service, model="other")
    with pytest.raises(InvalidRequest, match="gang_size 4"):
        generate(service, gang_size=4)


def test_a_gang_size_wakes_the_pool_that_lends_it() -> None:
    pools = [{"name": f"gangs-of-{n}", "workers": n, "gang_sizes": [n], "min_hosts": 0} for n in (1, 2, 4)]
    handles = {str(pool["name"]): FakeHandle() for pool in pools}
    service = Router(AppConfig.model_validate({"pools": pools}), handles, random.Random(0), CREATED)  # type: ignore[arg-type]
    generate(service, gang_size=4)
    assert {name: len(handle.calls) for name, handle in handles.items()} == {
        "gangs-of-1": 0,
        "gangs-of-2": 0,
        "gangs-of-4": 1,
    }


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


def test_too_few_workers_are_no_full_queue() -> None:
    handle = FakeHandle("a")
    handle.gang_sizes = ()
    with pytest.raises(NotEnoughDevices, match="workers are down"):
        generate(front(pool=handle))


def test_what_serve_cannot_run_is_unavailable() -> None:
    def undeployed(host: str | None, request: GenerationRequest) -> Any:
        raise DeploymentUnavailableError(DeploymentID("pool", "app"))

    handle = FakeHandle("a")
    handle.deeds = [undeployed]
    with pytest.raises(NotEnoughDevices, match="serve status"):
        generate(front(pool=handle))


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
