"""An image with what its request carries, in a gang of processes, one of which dies."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from PIL import Image

from distriray.gang import BlockingHost
from distriray.results import GenerationResult
from tests.gang.conftest import ask, policy_of
from tests.gang.policies import Script
from tests.gang.test_faults import kill_one_at, whole
from tests.gang.test_host import difference

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

PICTURE = Image.effect_noise((32, 32), 90).resize((128, 128), Image.Resampling.NEAREST)
CONTROL = {"control": [{"name": "edges", "image": PICTURE, "scale": 0.9}]}
LIKE = {"ip_adapters": [{"name": "style", "image": PICTURE, "scale": 1.0}]}
STEPS = 60


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("carried", [CONTROL, LIKE], ids=["control", "ip-adapter"])
def test_what_a_request_carries_survives_a_killed_worker(
    host: BlockingHost, carried: dict[str, Any], rank: int
) -> None:
    """It goes on in the survivor, and later in workers that never had its picture."""
    fields = {"num_inference_steps": STEPS, **carried}
    alone = host.generate(ask(gang_size=1, **fields))
    plain = host.generate(ask(gang_size=1, num_inference_steps=STEPS))
    assert difference(plain, alone) > 8
    policy_of(host).change(Script([(0, 1)], every=STEPS))

    async def scene() -> GenerationResult:
        task = asyncio.ensure_future(host.host.generate(ask(id="led", **fields)))
        await kill_one_at(host, "led", 10, rank)
        policy_of(host).change(Script([(1 - rank,), (2, 3)], every=15))
        result = await task
        await whole(host)
        return result

    result = host.do(scene())
    assert result.repairs == 1
    first, second, *_ = result.segments
    assert len(first.workers) == 2 and second.workers == (1 - rank,)
    assert 10 <= first.last_step == second.first_step < STEPS / 2
    assert {2, 3} <= {worker for segment in result.segments for worker in segment.workers}
    assert difference(result, alone) <= 1
