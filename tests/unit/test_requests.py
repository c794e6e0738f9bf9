"""Requests say what is wrong with them, and settle what they leave open."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from distriray.config import ParallelConfig
from distriray.denoise.pipelines.terms import Terms
from distriray.errors import InvalidRequest
from distriray.limits import Limits
from distriray.requests import GenerationRequest
from distriray.steps import StepCount


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"prompt": "x", "height": 500}, "height", "height 500 is not a multiple of 8; use 496 or 504"),
        ({"prompt": "x", "width": 4}, "width", "width 4 is not a multiple of 8; use 8"),
        ({"prompt": "x", "num_images": 0}, "num_images", "greater than or equal to 1"),
        ({"prompt": "x", "gang_size": "two"}, "gang_size", "'two'"),
        ({"prompt": "x", "guidance_scale": float("nan")}, "guidance_scale", "finite"),
        ({"prompt": "x", "deadline_s": 1e30}, "deadline_s", "less than or equal to 1000000000"),
        ({"prompt": "x", "steps": 3}, "steps", "there is no field 'steps'"),
        ({"prompt": "x", "scheduler": "eulr"}, "scheduler", "scheduler 'eulr': input should be 'ddim', "),
        ({"prompt": "x", "exchange": "fast"}, "exchange", "exchange 'fast': input should be 'auto', "),
        ({"prompt": "x", "exchange": "sync", "parallel": ParallelConfig()}, "exchange", "give one of them"),
        ({}, "prompt", "prompt is missing"),
        ({"prompt": "x", "gang size": 2}, "gang size", "no field 'gang size'"),
        ({"prompt": "x", "loras": [{}]}, "loras.0.name", "loras.0.name is missing"),
        (
            {"prompt": "x", "loras": [{"name": "a", "scale": "b"}]},
            "loras.0.scale",
            "loras.0.scale 'b': input",
        ),
        ({"prompt": "x", "parallel": {"cfg_parallel": 7}}, "parallel.cfg_parallel", "boolean.*, or 'auto'"),
        ({"prompt": "x", "parallel": {"exchange": {"halo": 1}}}, "parallel.exchange.halo", "no field"),
        (
            {"prompt": "x", "parallel": {"exchange": {"halos": "stale", "halos_width": "int8"}}},
            "parallel.exchange",
            "or stale halos are sent whole",
        ),
    ],
)
def test_an_invalid_field_is_named_with_its_value(fields: dict[str, Any], param: str, says: str) -> None:
    for make in (lambda: GenerationRequest(**fields), lambda: GenerationRequest.parse(fields)):
        with pytest.raises(InvalidRequest, match=says) as refused:
            make()
        assert refused.value.param == param


@pytest.mark.parametrize("field", Limits.TEXTS)
def test_half_a_character_is_refused_before_a_worker_or_http_fails_over_it(field: str) -> None:
    with pytest.raises(
        InvalidRequest, match=f"^{field} is no Unicode: U\\+D800 at 2 is half a character"
    ) as refused:
        GenerationRequest(**{"prompt": "a lake", field: "a \ud800"})
    assert refused.value.param == field
    GenerationRequest(**{"prompt": "a lake", field: "a \U0001f300"})


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_sizes_are_multiples_of_eight_or_refused(height: int, width: int) -> None:
    fields = {"prompt": "x", "height": height, "width": width}
    if height % 8 or width % 8:
        with pytest.raises(InvalidRequest):
            GenerationRequest.parse(fields)
    else:
        assert GenerationRequest.parse(fields).height == height


@given(st.integers(1, 200), st.integers(0, 8))
def test_previews_fall_between_the_first_and_the_last_step(steps: int, previews: int) -> None:
    chosen = GenerationRequest(prompt="x", num_inference_steps=steps, previews=previews).preview_steps(steps)
    assert all(0 < step < steps for step in chosen) and len(chosen) <= previews
    if steps > previews:
        assert len(chosen) == previews


def test_what_is_left_open_is_settled_once() -> None:
    request = GenerationRequest(prompt="x", num_images=3, width=64).settled(256, 512)
    assert (request.height, request.width) == (256, 64)
    assert request.seeds == [request.seed, request.seed + 1, request.seed + 2]  # type: ignore[operator]
    assert request.settled(8, 8) == request and request.seeded(7) == request
    assert pickle.loads(pickle.dumps(request)) == request
    assert GenerationRequest.parse(request.model_dump_json()) == request


def test_a_seed_is_drawn_given_or_kept() -> None:
    open_seed = GenerationRequest(prompt="x")
    assert open_seed.seeded(7).seed == 7
    assert open_seed.seeded().seed != open_seed.seeded().seed
    with pytest.raises(InvalidRequest, match="seed"):
        open_seed.seeds  # noqa: B018


def test_every_field_says_what_it_is_for() -> None:
    for name, field in GenerationRequest.model_fields.items():
        assert field.description and len(field.description) > 8, name


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_inference_steps": 51}, "num_inference_steps 51 is above the limit of 50"),
        ({"num_images": 3}, "num_images 3 is above the limit of 2"),
        ({"height": 32}, "height 32 is below the limit of 64"),
        ({"height": 512, "width": 512}, "more than the limit of 100000 pixels"),
        ({"prompt": "x" * 11}, "prompt has 11 characters; the limit is 10"),
    ],
)
def test_limits_are_in_the_refusal(fields: dict[str, Any], says: str) -> None:
    limits = Limits(max_steps=50, max_images=2, max_pixels=100_000, max_prompt_chars=10)
    limits.check(GenerationRequest(prompt="x", num_inference_steps=50, num_images=2, height=256))
    with pytest.raises(InvalidRequest, match=says):
        limits.check(GenerationRequest.parse({"prompt": "x", **fields}))


def test_previews_of_a_second_order_scheduler_are_spread_over_all_of_its_steps() -> None:
    request = GenerationRequest(prompt="x", num_inference_steps=10, previews=3, scheduler="heun")
    assert request.num_steps(StepCount()) == 19
    assert request.preview_steps(19) == {5, 10, 14}


def test_what_a_request_says_of_sharing_goes_before_the_host() -> None:
    host = ParallelConfig(exchange="displaced", max_wait=0.5)
    assert GenerationRequest(prompt="x").shared(host) == host
    asked = GenerationRequest(prompt="x", exchange="sync").shared(host)
    assert asked == ParallelConfig(exchange="sync", max_wait=0.5)
    whole = ParallelConfig(exchange="none")
    assert GenerationRequest(prompt="x", parallel=whole).shared(host) == whole


def test_strength_is_by_default_some_of_the_steps_and_all_of_them_inside_a_mask() -> None:
    image = Image.new("RGB", (64, 64))
    on_image = GenerationRequest(prompt="x", image=image, num_inference_steps=10)
    in_mask = GenerationRequest(prompt="x", image=image, mask_image=image, num_inference_steps=10)
    assert [Terms().settle(one, (64, 64), 8).num_steps(StepCount()) for one in (on_image, in_mask)] == [6, 10]
    assert Terms().settle(GenerationRequest(prompt="x"), (64, 64), 8).strength is None
    with pytest.raises(InvalidRequest, match="strength is left open"):
        on_image.num_steps(StepCount())
