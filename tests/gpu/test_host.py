"""A whole host on one device: on a GPU, and on a CPU so that it is known to run. No Ray is started."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from distriray.errors import GenerationCancelled
from distriray.events import Repaired
from distriray.gang.job import Job
from distriray.results import GenerationResult
from tests.likeness import apart
from tests.unit.gang.runners import ask

from .one_device import InProcess, OneDevice

STEPS = 8


@pytest.fixture
def host(tiny_model: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes one. No graphs: they are captured by processes that have a worker each, and load nothing then."""

    def make(**parallel: Any) -> OneDevice:
        model = {"name": str(tiny_model), "dtype": "float32"}
        parallel = {"exchange": "sync", "cuda_graphs": False, **parallel}
        return OneDevice(monkeypatch, device, model=model, parallel=parallel)

    return make


def do(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 240))


def alike(result: GenerationResult, wanted: GenerationResult) -> bool:
    return apart(result.images[0], wanted.images[0]) <= 1


def test_gangs_and_lone_workers_draw_the_same_also_beside_each_other(host: Any) -> None:
    async def scene() -> None:
        async with host() as one:
            alone = await one.draw(ask(gang_size=1, num_inference_steps=STEPS))
            together = await one.draw(ask(gang_size=2, num_inference_steps=STEPS))
            assert (alone.gang_size, together.gang_size) == (1, 2) and alike(together, alone)
            asked = [ask(gang_size=size, num_inference_steps=STEPS) for size in (1, 1, 2)]
            results = await asyncio.gather(*map(one.draw, asked))
            assert [result.gang_size for result in results] == [1, 1, 2]
            assert {result.segments[0].workers for result in results[:2]} == {(0,), (1,)}
            assert all(alike(result, alone) for result in results)

    do(scene())


def test_a_request_is_cancelled_in_a_step_and_its_gang_draws_the_next(host: Any) -> None:
    async def scene() -> None:
        async with host(exchange="displaced", warmup_steps=1) as one:
            before = await one.draw(ask(gang_size=2, num_inference_steps=STEPS))
            job = one.dispatcher.accept(ask(gang_size=2, num_inference_steps=STEPS))
            in_step(one.workers[0], 3, lambda: one.dispatcher.cancel(job))
            with pytest.raises(GenerationCancelled):
                await job.ended
            after = await one.draw(ask(gang_size=2, num_inference_steps=STEPS))
            assert apart(after.images[0], before.images[0]) == 0 and after.repairs == 0

    do(scene())


def test_a_worker_dies_in_a_step_and_the_picture_is_the_same(host: Any) -> None:
    """The survivor goes on; gangs are formed anew, on a GPU while nobody computes; the new gang draws too."""

    async def scene() -> None:
        async with host() as one:
            wanted = await one.draw(ask(gang_size=2, num_inference_steps=STEPS))
            job = one.dispatcher.accept(ask(gang_size=2, num_inference_steps=STEPS))
            in_step(one.workers[1], 3, one.workers[1].kill)
            result = await job.ended
            (repaired,) = (event for event in told(job) if isinstance(event, Repaired))
            assert repaired.lost_workers == (1,) and 0 < repaired.step < STEPS
            assert result.repairs == 1 and alike(result, wanted)
            while len(one.dispatcher.free) < 2:
                await asyncio.sleep(0.01)
            assert len(one.workers) == 3 and one.dispatcher.group.failure is None
            assert alike(await one.draw(ask(gang_size=2, num_inference_steps=STEPS)), wanted)

    do(scene())


def in_step(worker: InProcess, step: int, action: Any) -> None:
    """Let the host do that when the worker begins its step with that number, once.

    It has begun to when the step goes on: what ends a gang waits for its turn in it.
    """
    denoiser, loop, begun = worker.worker.runner._denoiser, asyncio.get_running_loop(), threading.Event()
    own = denoiser.step

    def act() -> None:
        begun.set()
        action()

    def stepping(state: Any) -> None:
        if state.step == step and not begun.is_set():
            loop.call_soon_threadsafe(act)
            assert begun.wait(60)
        own(state)

    denoiser.step = stepping


def told(job: Job) -> list[Any]:
    return [job.events.get_nowait() for _ in range(job.events.qsize())]
