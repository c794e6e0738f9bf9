"""The unmodified `openai` client edits pictures by a service with routers, pools and gangs."""

from __future__ import annotations

import threading
from base64 import b64decode
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from distriray import Client, HandleClient
from distriray.errors import GenerationCancelled, InvalidRequest
from tests.unit.http.malformed import EDITS, malformed_forms, picture

from .conftest import HTTP, Service, until

pytestmark = pytest.mark.ray


@pytest.fixture
def openai_client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{HTTP}/v1", api_key="none", max_retries=0) as client:
        yield client


def png(image: Image.Image) -> bytes:
    out = BytesIO()
    image.save(out, "PNG", compress_level=0)
    return out.getvalue()


LAKE = Image.linear_gradient("L").resize((128, 128)).convert("RGB")
HOLE = LAKE.convert("RGBA")
HOLE.paste((0, 0, 0, 0), (48, 0, 128, 128))
MASK = Image.new("L", (128, 128))
MASK.paste(255, (48, 0, 128, 128))
FIELDS: dict[str, Any] = {"seed": 7, "num_inference_steps": 4}


def drawn(encoded: str | None) -> np.ndarray:
    return np.array(Image.open(BytesIO(b64decode(encoded or ""))), dtype=int)


def test_an_edit_is_the_same_by_every_client_with_and_without_a_mask_and_streaming(
    service: Service, client: HandleClient, openai_client: openai.OpenAI
) -> None:
    edit = {"image": png(LAKE), "prompt": "a lake", "model": service.models["pair"]}
    plain = openai_client.images.edit(**edit, extra_body={**FIELDS, "strength": 0.5})
    masked = openai_client.images.edit(**edit, mask=png(HOLE), extra_body={**FIELDS, "gang_size": 2})
    by_alpha = openai_client.images.edit(**{**edit, "image": png(HOLE)}, extra_body=FIELDS)
    *partials, completed = openai_client.images.edit(
        **edit, mask=png(HOLE), stream=True, partial_images=1, extra_body=FIELDS
    )
    assert plain.data and masked.data and by_alpha.data and len(partials) == 1
    assert plain.size == masked.size == "128x128"
    assert np.abs(drawn(completed.b64_json) - drawn(masked.data[0].b64_json)).max() <= 1
    ask = {"model": service.models["pair"], "image": LAKE, **FIELDS}
    (unmasked,) = client.generate("a lake", **ask, strength=0.5).images
    with Client(HTTP) as own:
        (filled,) = own.generate("a lake", **ask, mask_image=MASK).images
    assert np.abs(np.array(unmasked, dtype=int) - drawn(plain.data[0].b64_json)).max() <= 1
    assert np.abs(np.array(filled, dtype=int) - drawn(masked.data[0].b64_json)).max() <= 1


def test_a_picture_of_megabytes_goes_through_routers_and_hosts(service: Service) -> None:
    large = png(Image.effect_noise((1600, 1500), 90).convert("RGB"))
    assert len(large) > 6 * 2**20
    fields = {"prompt": "a lake", "size": "64x64", "num_inference_steps": 2, "model": service.models["twins"]}
    answer = httpx.post(f"{HTTP}{EDITS}", data=fields, files={"image": large}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert "1600x1500 is stretched to 64x64" in answer.json()["warnings"][0]
    assert httpx.post(f"{HTTP}{EDITS}", content=b"x" * (34 * 2**20), timeout=60).status_code in (400, 413)


def test_a_picture_that_a_worker_cannot_read_is_refused_by_name(
    service: Service, client: HandleClient
) -> None:
    cut = png(Image.effect_noise((128, 128), 90))[:9000]
    with pytest.raises(InvalidRequest, match="image is damaged or cut short") as refused:
        client.generate("a lake", model=service.models["pair"], image=cut, num_inference_steps=2)
    assert refused.value.param == "image"


def test_malformed_forms_are_refused_and_the_service_goes_on(service: Service) -> None:
    with httpx.Client(base_url=HTTP, timeout=60) as http:
        for request in malformed_forms(seed=3, count=60):
            if request.status != 413:  # which a larger bound lets in
                assert request.send(http).status_code == request.status
        fields = {"prompt": "a lake", "size": "64x64", "num_inference_steps": 2}
        done = http.post(EDITS, data={**fields, "model": service.models["pair"]}, files={"image": picture()})
        assert done.status_code == 200, done.text


def test_a_request_is_cancelled_by_its_id_at_any_router(service: Service, client: HandleClient) -> None:
    seen: list[str] = []
    ended: list[BaseException] = []

    def watch(client: Client) -> None:
        try:
            for event in client.stream("a lake", model=service.models["twins"], num_inference_steps=200):
                seen.append(getattr(event, "request_id", ""))
        except GenerationCancelled as error:
            ended.append(error)

    for _ in range(4):  # so that another router than the one that has it is asked, too
        seen.clear()
        ended.clear()
        with Client(HTTP) as asks, Client(HTTP) as cancels:
            watching = threading.Thread(target=watch, args=(asks,))
            watching.start()
            until(lambda: seen)
            assert not cancels.cancel(seen[0][:-1] + "x") and cancels.cancel(seen[0])
            watching.join(60)
            assert len(ended) == 1
            assert not cancels.cancel(seen[0])
