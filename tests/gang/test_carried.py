"""An image with all that its request carries, in gangs of processes, one of which dies."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import ray
from PIL import Image
from ray._private.internal_api import memory_summary

from distriray.gang import BlockingHost
from distriray.results import GenerationResult
from distriray.routing.policies.earliest_deadline import EarliestDeadlineFirst
from tests.gang.conftest import ask, policy_of
from tests.gang.policies import Script
from tests.gang.test_faults import kill_one_at, whole
from tests.gang.test_host import difference

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

NOISE = Image.effect_noise((512, 512), 90).convert("RGB")  # of more bytes than a message carries by itself
PICTURE = Image.effect_noise((32, 32), 90).resize((128, 128), Image.Resampling.NEAREST)
MASK = Image.new("L", NOISE.size)
MASK.paste(255, (160, 128, 512, 512))
CARRIED: dict[str, Any] = {
    "image": NOISE,
    "mask_image": MASK,
    "control": [{"name": "edges", "image": PICTURE, "scale": 0.9}],
    "ip_adapters": [{"name": "style", "image": PICTURE, "scale": 1.0}],
    "loras": [{"name": "ink", "scale": 0.8}],
}
STEPS = 60  # enough for every move to arrive before the picture is done


@pytest.fixture(scope="module")
def alone(shared_host: BlockingHost) -> GenerationResult:
    """By one worker; without any of what is carried it would be another picture."""

    def drawn(carried: dict[str, Any], steps: int) -> GenerationResult:
        return shared_host.generate(ask(gang_size=1, num_inference_steps=steps, **carried))

    everything = drawn(CARRIED, 8)
    for name in CARRIED:
        without = {name, "mask_image"} if name == "image" else {name}  # a mask is a picture's
        rest = {field: value for field, value in CARRIED.items() if field not in without}
        assert difference(drawn(rest, 8), everything) > 8, name
    return drawn(CARRIED, STEPS)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_costs_neither_steps_nor_what_the_request_carries_and_nothing_is_kept(
    host: BlockingHost, alone: GenerationResult, rank: int
) -> None:
    """It goes on in the survivor, then in workers that never had its pictures."""
    policy_of(host).change(Script([(0, 1)], every=STEPS))
    repairs, before = len(host.status().repairs), kept()

    async def scene() -> tuple[int, GenerationResult]:
        request = ask(id="led", num_inference_steps=STEPS, **CARRIED)
        task = asyncio.ensure_future(host.host.generate(request))
        killed = await kill_one_at(host, "led", 10, rank)
        policy_of(host).change(Script([(1 - rank,), (2, 3), (2,)], every=4))
        result = await task
        await whole(host)
        return killed, result

    killed, result = host.do(scene())
    assert killed == rank and result.repairs == 1
    assert [repair.worker for repair in host.status().repairs[repairs:]] == [killed]
    segments = result.segments
    assert [segment.workers for segment in segments] == [(0, 1), (1 - rank,), (2, 3), (2,)]
    assert 10 <= segments[0].last_step < STEPS / 2 and segments[-1].last_step == STEPS
    assert [s.first_step for s in segments[1:]] == [s.last_step for s in segments[:-1]], "no step is lost"
    assert difference(result, alone) <= 1
    assert kept() == before, "a picture is still there for workers"
    policy_of(host).change(EarliestDeadlineFirst())
    assert host.generate(ask(gang_size=4)).segments[0].workers == (0, 1, 2, 3)


def kept() -> str:
    """What Ray's object store says that it has, once it has heard of what nobody refers to."""
    time.sleep(1.5)
    return memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
