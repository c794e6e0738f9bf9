"""Gangs on a real local Ray: pictures, regrouping, cancellation, queues, events."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from PIL import Image

from distriray.errors import GenerationCancelled, InvalidRequest, QueueFull
from distriray.events import Finished, Preview, Queued, Regrouped, Started, Step
from distriray.gang import BlockingHost
from distriray.results import GenerationResult
from tests.gang.conftest import ask, policy_of
from tests.gang.policies import Script

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def difference(one: GenerationResult, other: GenerationResult) -> int:
    """The largest difference of a colour value, out of 255."""
    return max(
        int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())
        for a, b in zip(one.images, other.images, strict=True)
    )


@pytest.fixture(scope="module")
def alone(shared_host: BlockingHost) -> GenerationResult:
    return shared_host.generate(ask(gang_size=1, num_inference_steps=16))


def test_gangs_of_1_2_and_4_draw_the_same_picture_in_sync_mode(
    host: BlockingHost, alone: GenerationResult
) -> None:
    for size in (2, 4):
        result = host.generate(ask(gang_size=size, num_inference_steps=16))
        assert result.gang_size == size and len(result.segments[0].workers) == size
        assert difference(result, alone) <= 1


def test_another_seed_is_another_picture(host: BlockingHost, alone: GenerationResult) -> None:
    assert difference(host.generate(ask(gang_size=2, num_inference_steps=16, seed=8)), alone) > 8


def test_every_image_of_a_batch_is_its_seeds_own(host: BlockingHost, alone: GenerationResult) -> None:
    batch = host.generate(ask(gang_size=2, num_inference_steps=16, seed=6, num_images=2))
    assert batch.seeds == [6, 7]
    assert difference(batch.model_copy(update={"images": batch.images[1:]}), alone) <= 1


def test_regrouping_2_4_1_2_mid_image_changes_nothing_in_sync_mode(
    host: BlockingHost,
) -> None:
    steps = 80  # enough for every move to arrive before the picture is done
    alone = host.generate(ask(gang_size=1, num_inference_steps=steps))
    gangs = [(0, 1), (0, 1, 2, 3), (2,), (2, 3)]
    policy_of(host).change(Script(gangs, every=4))
    result = host.generate(ask(num_inference_steps=steps))
    assert [segment.workers for segment in result.segments] == gangs
    assert [segment.first_step for segment in result.segments][1:] == [
        segment.last_step for segment in result.segments
    ][:-1]
    assert difference(result, alone) <= 1


def test_a_stream_tells_what_happens_in_order(host: BlockingHost) -> None:
    policy_of(host).change(Script([(0,), (0, 1)], every=6))
    events = list(host.stream(ask(num_inference_steps=60, previews=3)))
    kinds = [type(event) for event in events]
    assert kinds[:2] == [Queued, Started] and kinds[-1] is Finished
    assert kinds.count(Regrouped) == 1
    previews = [event for event in events if isinstance(event, Preview)]
    assert [preview.step for preview in previews] == [15, 30, 45]
    assert [preview.index for preview in previews] == [0, 1, 2]
    assert all(isinstance(preview.image, Image.Image) for preview in previews)
    steps = [event.step for event in events if isinstance(event, Step)]
    assert steps == sorted(set(steps)) and len(steps) >= 2


def test_cancelling_stops_a_running_gang_within_two_steps(host: BlockingHost) -> None:
    async def scene() -> tuple[int, BaseException | None]:
        task = asyncio.ensure_future(host.host.generate(ask(id="long", num_inference_steps=150)))
        while not (running := host.host.status().running) or running[0].step < 3:
            await asyncio.sleep(0.01)
        seen = running[0].step
        assert await host.host.cancel("long")
        await asyncio.wait([task])
        return seen, task.exception()

    seen, error = host.do(scene())
    assert isinstance(error, GenerationCancelled)
    stopped = int(str(error).rsplit(" ", 1)[1])
    assert seen <= stopped < 150
    assert not host.cancel("long")


def test_leaving_a_stream_frees_the_gang(host: BlockingHost) -> None:
    for event in host.stream(ask(id="left", gang_size=4, num_inference_steps=150)):
        if isinstance(event, Step):
            break
    assert host.generate(ask(gang_size=4)).gang_size == 4  # it would wait for the other for long
    assert not host.status().running


def test_cancelling_a_caller_cancels_its_request(host: BlockingHost) -> None:
    async def scene() -> None:
        task = asyncio.ensure_future(host.host.generate(ask(id="caller", num_inference_steps=150)))
        while not host.host.status().running:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        while host.host.status().running:
            await asyncio.sleep(0.01)

    host.do(asyncio.wait_for(scene(), 30))


def test_a_full_queue_refuses_at_once_and_says_when_to_retry(host: BlockingHost) -> None:
    async def scene() -> None:
        tasks = [
            asyncio.ensure_future(host.host.generate(ask(gang_size=4, num_inference_steps=20)))
            for _ in range(1)
        ]
        while not host.host.status().running:
            await asyncio.sleep(0.01)
        tasks += [asyncio.ensure_future(host.host.generate(ask(gang_size=4))) for _ in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as refused:
            await host.host.generate(ask(gang_size=4))
        assert refused.value.retry_after_s > 0
        assert len(host.host.status().waiting) == 4 and host.host.backlog_s() > 0
        for result in await asyncio.gather(*tasks):
            assert result.timings.total_s >= result.timings.queued_s

    host.do(scene())


def test_the_earlier_deadline_goes_first(host: BlockingHost) -> None:
    async def scene() -> list[str]:
        order: list[str] = []

        async def one(name: str, deadline_s: float | None) -> None:
            await host.host.generate(ask(id=name, gang_size=4, deadline_s=deadline_s))
            order.append(name)

        await asyncio.gather(one("first", None), one("none", None), one("late", 50), one("soon", 40))
        return order

    assert host.do(scene())[-1] == "none"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"gang_size": 3}, "gang_size"),
        ({"height": 64, "gang_size": 4}, "gang_size"),
        ({"height": 8192}, "height"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(
    host: BlockingHost, fields: dict[str, int], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        host.generate(ask(**fields))
    assert refused.value.param == param


def test_an_error_of_the_model_reaches_the_owner_and_the_gang_goes_on(host: BlockingHost) -> None:
    with pytest.raises(InvalidRequest, match="scheduler"):
        host.generate(ask(gang_size=4, scheduler="bad"))
    assert host.generate(ask(gang_size=4)).repairs == 0


def test_a_worker_holds_no_state_of_finished_requests(host: BlockingHost) -> None:
    host.generate(ask(gang_size=4))

    async def none_held() -> None:  # nobody waits for a worker to forget
        members = host.host._dispatcher.group.members
        while sum([(await member.remote.ping())[1] for member in members]):
            await asyncio.sleep(0.05)

    host.do(asyncio.wait_for(none_held(), 10))
