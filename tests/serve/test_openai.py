"""The unmodified `openai` client through Serve's proxy and two routers."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import Callable, Iterator
from io import BytesIO

import openai
import pytest
from PIL import Image

from distriray.handle import HandleClient
from distriray.requests import GenerationRequest

from .conftest import HTTP, Service

pytestmark = pytest.mark.ray

SMALL = {"num_inference_steps": 4, "seed": 7}


@pytest.fixture
def api(service: Service, client: HandleClient) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{HTTP}/v1", api_key="any", max_retries=0, timeout=60) as api:
        yield api


def test_an_image_comes_with_its_seed_gang_and_timings(api: openai.OpenAI) -> None:
    answer = api.images.generate(prompt="a lake", n=2, size="128x64", extra_body={**SMALL, "gang_size": 2})
    assert answer.data is not None and answer.model_extra is not None
    assert [Image.open(BytesIO(b64decode(image.b64_json or ""))).size for image in answer.data] == [
        (128, 64)
    ] * 2
    assert [image.model_extra for image in answer.data] == [{"seed": 7}, {"seed": 8}]
    assert answer.model_extra["gang_size"] == 2
    assert 0 < answer.model_extra["timings"]["denoise_s"] <= answer.model_extra["timings"]["total_s"]


def test_previews_are_streamed_at_their_steps_before_the_image(
    api: openai.OpenAI, client: HandleClient, ask: Callable[..., GenerationRequest]
) -> None:
    body = {"num_inference_steps": 12, "seed": 7}
    events = api.images.generate(
        prompt="a lake", size="128x128", stream=True, partial_images=3, extra_body=body
    )
    *partials, completed = events
    assert [event.type for event in partials] == ["image_generation.partial_image"] * 3
    assert [event.model_extra["step"] for event in partials] == [3, 6, 9]  # type: ignore[index]
    assert completed.type == "image_generation.completed"
    streamed = Image.open(BytesIO(b64decode(completed.b64_json)))
    assert streamed.tobytes() == client.generate(ask(num_inference_steps=12)).images[0].tobytes()


def test_adapters_are_named_by_extra_body_and_an_unknown_one_is_told_which_there_are(
    api: openai.OpenAI, service: Service
) -> None:
    def draw(*loras: dict[str, object]) -> str | None:
        body = {**SMALL, "loras": list(loras)}
        answer = api.images.generate(prompt="a lake", size="128x128", extra_body=body)
        assert answer.data is not None and answer.model_extra is not None
        assert answer.model_extra["timings"]["adapters_s"] > 0 or not loras
        return answer.data[0].b64_json

    ink, neon = {"name": "ink", "scale": 0.8}, {"name": "neon", "scale": 0.8}
    plain = draw()
    assert len({plain, draw(ink), draw(neon), draw(ink, neon)}) == 4
    assert draw() == plain
    with pytest.raises(openai.NotFoundError) as refused:
        draw({"name": "oil"})
    assert refused.value.code == "adapter_not_found" and refused.value.param == "loras"
    assert "no adapter 'oil'; there is 'ink', 'neon'" in str(refused.value)
    pair = api.models.retrieve(service.models["pair"])
    assert pair.model_extra is not None and pair.model_extra["loras"] == ["ink", "neon"]


def test_models_are_listed_and_found_by_name(api: openai.OpenAI, service: Service) -> None:
    for model in api.models.list():
        assert api.models.retrieve(model.id).id == model.id
    assert [model.id for model in api.models.list()] == list(service.models.values())


def test_what_is_wrong_raises_the_right_exception(api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="use 496 or 504") as refused:
        api.images.generate(prompt="a lake", size="500x512")
    assert refused.value.param == "size"
    with pytest.raises(openai.NotFoundError) as unknown:
        api.images.generate(prompt="a lake", model="dall-e-3")
    assert unknown.value.code == "model_not_found"
    for _ in range(3):  # else nothing is known of its speed, and nobody is refused
        api.images.generate(prompt="a lake", size="128x128", extra_body=SMALL)
    with pytest.raises(openai.RateLimitError) as late:
        api.images.generate(prompt="a lake", extra_body={"num_inference_steps": 200, "deadline_s": 0.001})
    assert isinstance(late.value.body, dict)
    assert late.value.code == "deadline_unmet" and late.value.body["possible_s"] > 0.001


def test_a_full_queue_is_refused_at_once_and_what_was_accepted_is_done(api: openai.OpenAI) -> None:
    async def ask_all() -> list[openai.types.ImagesResponse | BaseException]:
        async with openai.AsyncOpenAI(
            base_url=f"{HTTP}/v1", api_key="any", max_retries=0, timeout=120
        ) as busy:
            asked = [
                busy.images.generate(prompt="a lake", size="128x128", extra_body={"num_inference_steps": 60})
                for _ in range(12)
            ]
            return await asyncio.gather(*asked, return_exceptions=True)

    answers = asyncio.run(ask_all())
    refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
    drawn = [answer for answer in answers if isinstance(answer, openai.types.ImagesResponse)]
    assert len(drawn) >= 3 and refused and len(drawn) + len(refused) == len(answers)
    assert all(answer.code == "queue_full" for answer in refused)
    assert all(int(answer.response.headers["Retry-After"]) >= 1 for answer in refused)
