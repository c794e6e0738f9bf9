"""Pictures of requests in gangs of processes: drawn on and filled in like any other."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from distriray.gang import BlockingHost
from tests.gang.conftest import ask
from tests.gang.test_host import difference

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

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
