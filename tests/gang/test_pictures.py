"""Pictures of requests in gangs of processes: drawn on, filled in, moved and repaired like any other."""

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
from tests.gang.conftest import ask, policy_of
from tests.gang.policies import Script
from tests.gang.test_faults import kill_one_at, whole
from tests.gang.test_host import difference

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

NOISE = Image.effect_noise((512, 512), 90).convert("RGB")  # of more bytes than a message carries by itself
PICTURE = Image.linear_gradient("L").resize((128, 128)).convert("RGB")
MASK = Image.new("L", (128, 128))
MASK.paste(255, (40, 32, 128, 128))


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("size", [2, 4])
def test_a_gang_draws_what_one_worker_does(host: BlockingHost, size: int, mask: Image.Image | None) -> None:
    on_picture: dict[str, Any] = {"image": PICTURE, "mask_image": mask, "strength": 0.8}
    alone = host.generate(ask(gang_size=1, **on_picture))
    together = host.generate(ask(gang_size=size, **on_picture))
    assert difference(alone, together) <= 1 and together.gang_size == size
    assert sum(segment.last_step - segment.first_step for segment in together.segments) == 4
    other = host.generate(ask(gang_size=1, **{**on_picture, "image": PICTURE.rotate(90)}))
    assert difference(alone, other) > 8


def test_a_picture_survives_regrouping_and_a_killed_worker_and_is_not_kept(host: BlockingHost) -> None:
    steps, fields = 60, {"image": NOISE, "mask_image": NOISE.convert("L"), "height": 128, "width": 128}
    alone = host.generate(ask(gang_size=1, num_inference_steps=steps, **fields))
    before = kept()
    policy = Script([(0, 1), (0, 1, 2, 3), (2, 3), (2,)], every=15)
    policy_of(host).change(policy)

    async def scene() -> GenerationResult:
        task = asyncio.ensure_future(host.host.generate(ask(id="moved", num_inference_steps=steps, **fields)))
        await kill_one_at(host, "moved", 20, 1)
        result = await task
        await whole(host)
        return result

    result = host.do(scene())
    assert result.repairs == 1 and len(result.segments) >= 3
    assert difference(result, alone) <= 1
    assert kept() == before, "the picture is still there for workers"


def kept() -> str:
    """What Ray's object store says that it has, once it has heard of what nobody refers to."""
    time.sleep(1.5)
    return memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
