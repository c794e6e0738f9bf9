"""Clients that leave, where Ray cancels all that their call has submitted, as Serve makes it do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from distriray.config import ParallelConfig
from distriray.gang import BlockingHost, Host, HostConfig
from distriray.models import ModelSpec
from distriray.requests import GenerationRequest
from distriray.results import GenerationResult
from distriray.status import HostStatus
from tests.gang.conftest import ask
from tests.gang.policies import NewestFirst

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


class HostActor:
    """A host in an actor, as in a Serve replica: each request is a call."""

    async def start(self, config: HostConfig) -> None:
        self.host = await Host.start(config, NewestFirst())
        self._came: set[str | None] = {None}

    async def generate(self, request: GenerationRequest, after: str | None) -> GenerationResult:
        while after not in self._came:  # Ray may start calls in another order than they were made in
            await asyncio.sleep(0)
        self._came.add(request.id)
        return await self.host.generate(request)

    async def status(self) -> HostStatus:
        return self.host.status()

    async def close(self) -> None:
        await self.host.close()


class Callers:
    """What the clients of the host see."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def generate(self, after: str | None = None, **fields: Any) -> Any:
        """Ask for a picture, once the request `after` has come."""
        return self._actor.generate.remote(ask(**fields), after)

    def status(self) -> HostStatus:
        status: HostStatus = ray.get(self._actor.status.remote())
        return status

    def until(self, condition: Callable[[HostStatus], object]) -> None:
        end = time.monotonic() + 60
        while not condition(self.status()):
            assert time.monotonic() < end
            time.sleep(0.02)

    def until_at(self, request_id: str, step: int) -> None:
        """Wait until a request runs and has done `step` steps."""
        self.until(lambda status: any(r.id == request_id and r.step >= step for r in status.running))


@pytest.fixture(scope="module")
def callers(shared_host: BlockingHost, tiny_model: Path) -> Iterator[Callers]:
    actor = ray.remote(HostActor).options(num_cpus=0, max_concurrency=100).remote()
    config = HostConfig(
        model=ModelSpec(name=str(tiny_model)),
        workers=2,
        gang_sizes=(2,),
        cpus_per_worker=0.5,
        device="cpu",
        parallel=ParallelConfig(exchange="sync"),
    )
    ray.get(actor.start.remote(config))
    yield Callers(actor)
    ray.get(actor.close.remote())
    ray.kill(actor)


def test_a_client_that_leaves_stops_its_gang_after_a_step_and_breaks_nothing(callers: Callers) -> None:
    pids = [worker.pid for worker in callers.status().workers]
    cancelled = callers.status().outcomes.get("cancelled", 0)
    for turn in range(4):
        left = callers.generate(id=f"left-{turn}", num_inference_steps=200)
        callers.until_at(f"left-{turn}", 3)
        ray.cancel(left, recursive=True)
        result = ray.get(callers.generate(id=f"next-{turn}"))
        assert result.repairs == 0
        status = callers.status()
        assert status.outcomes["cancelled"] == cancelled + turn + 1
        assert [worker.pid for worker in status.workers] == pids and not status.repairs
        assert all(worker.healthy for worker in status.workers)


def test_a_request_outlives_the_client_that_it_took_the_workers_from(callers: Callers) -> None:
    yielded = callers.generate(id="yielded", num_inference_steps=200)
    callers.until_at("yielded", 3)
    kept = callers.generate(id="kept", num_inference_steps=100)
    callers.until_at("kept", 3)
    ray.cancel(yielded, recursive=True)
    result = ray.get(kept)
    assert result.repairs == 0 and len(result.segments) == 1


def test_requests_outlive_the_client_that_made_the_host_decide(callers: Callers) -> None:
    first = callers.generate(id="first", num_inference_steps=200)
    second = callers.generate(after="first", id="second", num_inference_steps=100)
    callers.until_at("second", 3)
    ray.cancel(first, recursive=True)
    assert ray.get(second).repairs == 0
