"""The unmodified `openai` client gets its pictures, its events and the right exceptions."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import Iterator
from io import BytesIO
from urllib.request import urlopen

import openai
import pytest
from PIL import Image

from distriray.errors import DeadlineUnmet, DistrirayError, GangBroken, NotEnoughDevices, QueueFull
from distriray.picture import Picture
from distriray.wire import OF_PICTURES
from tests.unit.conftest import serving
from tests.unit.http.fake import FakeService

EDGES = Picture.of(Image.new("L", (16, 8))).url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


def picture(encoded: str | None) -> Image.Image:
    return Image.open(BytesIO(b64decode(encoded or "")))


@pytest.mark.parametrize("quality", ["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"])
def test_every_quality_of_openai_is_one_that_a_client_may_send(client: openai.OpenAI, quality: str) -> None:
    assert client.images.generate(prompt="a lake", extra_body={"quality": quality}).data


def test_an_image_comes_with_its_seed_gang_and_timings(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt="a lake",
        model="builtin:landscapes",
        size="128x64",
        n=2,
        quality="hd",
        moderation="low",
        background="opaque",
        user="me",
        extra_body={
            "seed": 7,
            "num_inference_steps": 3,
            "guidance_scale": 4,
            "scheduler": "euler",
            "style": None,
        },
    )
    assert answer.data is not None and answer.usage is None
    assert [picture(image.b64_json).size for image in answer.data] == [(128, 64)] * 2
    assert [image.model_extra for image in answer.data] == [{"seed": 7}, {"seed": 8}]
    assert (answer.size, answer.output_format, answer.background) == ("128x64", "png", "opaque")
    assert answer.model_extra is not None
    assert answer.model_extra["gang_size"] == 2 and answer.model_extra["timings"]["total_s"] == 1.25
    assert answer.model_extra["exchange"] == answer.model_extra["segments"][0]["exchange"] == "sync"


def test_every_field_reaches_the_service(client: openai.OpenAI, service: FakeService) -> None:
    extra = {
        "negative_prompt": "houses",
        "prompt_2": "trees",
        "negative_prompt_2": "roofs",
        "prompt_3": "grass",
        "negative_prompt_3": "walls",
        "original_size": "640x480",
        "crops_coords_top_left": "16,0",
        "target_size": "320x240",
        "seed": 3,
        "num_inference_steps": 9,
        "guidance_scale": 2.5,
        "guidance_rescale": 0.5,
        "guidance_end": 0.5,
        "scheduler": "ddim",
        "clip_skip": 1,
        "control": ({"name": "canny", "image": EDGES, "scale": 0.5, "start": 0.25, "end": 0.75},),
        "ip_adapters": ({"name": "style", "image": EDGES, "scale": 0.5},),
        "references": ({"image": EDGES}, {"image": EDGES}),
        "loras": ({"name": "ink", "scale": 0.8}, {"name": "neon", "scale": -1.0}),
        "gang_size": 2,
        "exchange": "displaced",
        "deadline_s": 60,
    }
    client.images.generate(prompt="a hill", model="builtin:landscapes", n=3, size="64x96", extra_body=extra)
    asked = service.asked[-1].model_dump(exclude={"id", "parallel", "priority"})
    assert asked == {
        "prompt": "a hill",
        "model": "builtin:landscapes",
        "height": 96,
        "width": 64,
        "num_images": 3,
        "previews": 0,
        **dict.fromkeys(OF_PICTURES),
        **extra,
    }


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_pictures_come_in_the_format_asked_for(client: openai.OpenAI, output_format: str) -> None:
    fields = {"prompt": "a lake", "output_format": output_format}
    answer = client.images.generate(**fields)  # type: ignore[call-overload]
    assert picture(answer.data[0].b64_json).format == output_format.upper()
    if output_format != "png":
        client.images.generate(**fields, output_compression=0)  # type: ignore[call-overload]


def test_a_url_is_the_picture_itself(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a lake", response_format="url", output_format="webp")
    assert answer.data is not None and answer.data[0].b64_json is None
    with urlopen(answer.data[0].url or "") as response:
        assert response.headers["Content-Type"] == "image/webp"
        assert Image.open(BytesIO(response.read())).size == (96, 64)


def test_a_stream_carries_previews_and_then_the_image(client: openai.OpenAI) -> None:
    events = client.images.generate(
        prompt="a lake", stream=True, partial_images=3, extra_body={"num_inference_steps": 8, "seed": 5}
    )
    *partials, completed = events
    assert [event.type for event in partials] == ["image_generation.partial_image"] * 3
    assert [event.partial_image_index for event in partials] == [0, 1, 2]  # type: ignore[union-attr]
    assert [event.model_extra["step"] for event in partials] == [2, 4, 6]  # type: ignore[index]
    assert [picture(event.b64_json).getpixel((0, 0)) for event in partials] == [
        (2, 0, 0),
        (4, 0, 0),
        (6, 0, 0),
    ]
    assert all(event.size == "8x12" for event in partials)
    assert completed.type == "image_generation.completed"
    assert picture(completed.b64_json).size == (96, 64) and completed.size == "96x64"
    assert completed.usage.total_tokens == 0
    assert completed.model_extra is not None and completed.model_extra["seed"] == 5


def test_progress_is_streamed_if_asked_for(client: openai.OpenAI) -> None:
    body = {"progress": True, "num_inference_steps": 2}
    events = list(client.images.generate(prompt="a lake", stream=True, extra_body=body))
    assert [event.model_extra.get("state") for event in events[:-1]] == [  # type: ignore[union-attr]
        "queued",
        "started",
        "running",
        "running",
    ]
    assert events[-1].type == "image_generation.completed"


def test_models_are_listed_and_found_by_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["builtin:landscapes", "some/other"]
    assert client.models.retrieve("some/other").created == 2
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("gpt-image-1")
    assert refused.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("fields", "kind", "code", "param", "says"),
    [
        ({"size": "500x512"}, openai.BadRequestError, "invalid_value", "size", "use 496 or 504"),
        ({"size": "8x8"}, openai.BadRequestError, "invalid_value", "size", "below the limit of 64"),
        ({"n": 5}, openai.BadRequestError, "invalid_value", "n", "n 5 is above the limit of 4"),
        ({"model": "dall-e-3"}, openai.NotFoundError, "model_not_found", "model", "'dall-e-3'"),
        (
            {"extra_body": {"loras": [{"name": "/etc/passwd"}]}},
            openai.BadRequestError,
            "invalid_value",
            "loras.0.name",
            "should match pattern",
        ),
        (
            {"extra_body": {"loras": [{"name": "ink", "weight": 1}]}},
            openai.BadRequestError,
            "unknown_parameter",
            "loras.0.weight",
            "no field 'loras.0.weight'",
        ),
        (
            {"extra_body": {"loras": [{"name": f"style-{i}"} for i in range(9)]}},
            openai.BadRequestError,
            "invalid_value",
            "loras",
            "names 9 adapters; the limit is 8",
        ),
        ({"style": "vivid"}, openai.BadRequestError, "invalid_value", "style", "style"),
        (
            {"extra_body": {"safety_identifier": "me"}},
            openai.BadRequestError,
            "unknown_parameter",
            "safety_identifier",
            "no field 'safety_identifier'",
        ),
        ({"stream": True, "n": 2}, openai.BadRequestError, "invalid_value", "n", "streaming makes one image"),
        ({"partial_images": 1}, openai.BadRequestError, "invalid_value", "partial_images", "set stream"),
        (
            {"stream": True, "partial_images": 4},
            openai.BadRequestError,
            "invalid_value",
            "partial_images",
            "partial_images 4 is above the limit of 3",
        ),
        (
            {"extra_body": {"gang_size": 8}},
            openai.BadRequestError,
            "invalid_value",
            "gang_size",
            r"use one of \[1, 2\]",
        ),
    ],
)
def test_what_is_wrong_raises_the_right_exception(
    client: openai.OpenAI,
    fields: dict[str, object],
    kind: type[openai.APIStatusError],
    code: str,
    param: str,
    says: str,
) -> None:
    with pytest.raises(kind, match=says) as refused:
        client.images.generate(prompt="a lake", **fields)  # type: ignore[call-overload]
    assert (refused.value.code, refused.value.param) == (code, param)


def test_a_full_queue_says_when_to_try_again() -> None:
    for stream in (False, True):
        with serving(FakeService(refusal=QueueFull("8 requests wait", retry_after_s=2.2))) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
            with pytest.raises(openai.RateLimitError, match="8 requests wait") as refused:
                client.images.generate(prompt="a lake", stream=stream)
            assert refused.value.code == "queue_full"
            assert refused.value.response.headers["Retry-After"] == "3"


def test_an_unmet_deadline_says_what_can_be_met_and_is_not_retried() -> None:
    service = FakeService(refusal=DeadlineUnmet("deadline_s 1: 12.5 s could be met", possible_s=12.5))
    with serving(service) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=2)
        with pytest.raises(openai.RateLimitError, match="12.5 s could be met") as refused:
            client.images.generate(prompt="a lake", extra_body={"deadline_s": 1})
    assert isinstance(refused.value.body, dict)
    assert (refused.value.code, refused.value.body["possible_s"]) == ("deadline_unmet", 12.5)
    assert len(service.asked) == 1


@pytest.mark.parametrize(
    ("failure", "times"),
    [(GangBroken("3 hosts died under it"), 1), (NotEnoughDevices("too many workers are down"), 2)],
)
def test_what_hosts_died_of_is_not_asked_for_again_and_what_none_took_is(
    failure: DistrirayError, times: int
) -> None:
    service = FakeService(refusal=failure)
    with serving(service) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=1)
        with pytest.raises(openai.InternalServerError, match=str(failure)):
            client.images.generate(prompt="a lake")
    assert len(service.asked) == times


def test_a_failure_in_the_middle_ends_the_stream_with_an_error() -> None:
    with serving(FakeService(failure=GangBroken("3 gangs broke under it"))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        events = client.images.generate(prompt="a lake", stream=True, partial_images=1)
        assert next(events).type == "image_generation.partial_image"
        with pytest.raises(openai.APIError, match="3 gangs broke under it") as failed:
            next(events)
        assert failed.value.code == "gang_broken"


def test_the_async_client_is_served_as_well(url: str) -> None:
    async def draw() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any") as client:
            events = await client.images.generate(prompt="a lake", stream=True, partial_images=1)
            return [event.type async for event in events]

    assert asyncio.run(draw()) == ["image_generation.partial_image", "image_generation.completed"]
