"""On one device each family draws what diffusers' pipelines draw, bit for bit, for all their tasks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distriray.denoise import Denoiser, DenoiseState
from tests.likeness import apart
from tests.unit.flow_matching.families import MODELS, begin, skip_unless_taken
from tests.unit.flow_matching.ordinary import named, on_pictures, plain
from tests.unit.test_denoise import MASK, PICTURE, SIZE, finish, finish_through_bytes


@pytest.mark.parametrize("scheduler", [None, "dpmpp-2m", "euler", "heun", "unipc"])
def test_steps_by_hand_are_the_ordinary_pipelines_bit_for_bit_also_through_bytes(
    pipeline: Any, denoiser: Denoiser, scheduler: str | None
) -> None:
    skip_unless_taken(denoiser, scheduler)
    by_size = pipeline.scheduler.config.use_dynamic_shifting
    if scheduler == "dpmpp-2m" and hasattr(pipeline, "_unpack_latents") and not by_size:
        pytest.skip("diffusers' FluxPipeline always shifts this one by the size, which it refuses")
    call = {"num_inference_steps": 5, **SIZE}
    expected = plain(pipeline, [1, 2], named(scheduler, pipeline), **call)
    state = begin(denoiser, [1, 2], prompt="a lake", scheduler=scheduler, **call)
    carried = finish_through_bytes(denoiser, state)
    assert torch.equal(finish(denoiser, state), expected)
    assert torch.equal(carried, expected)


@pytest.mark.parametrize("scheduler", ["euler", "heun", None])
def test_image_to_image_is_the_ordinary_pipelines_bit_for_bit(
    pipeline: Any, denoiser: Denoiser, scheduler: str | None
) -> None:
    skip_unless_taken(denoiser, scheduler)
    other = on_pictures(pipeline, "image-to-image")
    call = {"image": PICTURE, "strength": 0.7, "num_inference_steps": 6, **SIZE}
    call["guidance_scale"] = denoiser.terms.guidance_scale  # as for text to image, where diffusers has two
    pictures = {"image": [PICTURE] * 2}
    expected = plain(other, [1, 2], named(scheduler, pipeline), **{**call, **pictures})
    state = begin(denoiser, [1, 2], prompt="a lake", scheduler=scheduler, **call)
    assert state.num_steps == (9 if scheduler == "heun" else 5)
    assert torch.equal(finish(denoiser, state), expected)


@pytest.mark.parametrize(
    ("strength", "scheduler", "guided", "seeds"),
    [
        (1.0, None, True, [1, 2]),
        (0.7, None, False, [1]),
        (0.7, "euler", True, [1, 2]),
        (1.0, "heun", False, [1]),
        (0.7, "heun", True, [1, 2]),
    ],
)
def test_inpainting_is_the_ordinary_pipelines_bit_for_bit_also_through_bytes(
    pipeline: Any,
    denoiser: Denoiser,
    strength: float,
    scheduler: str | None,
    guided: bool,
    seeds: list[int],
) -> None:
    skip_unless_taken(denoiser, scheduler)
    other = pipeline if denoiser.terms.needs_mask else on_pictures(pipeline, "inpainting")
    terms = denoiser.terms
    scale = (
        max(terms.guidance_scale, 3.0) if guided and "guidance_scale" not in terms.lacks else terms.unguided
    )
    call = {"image": PICTURE, "mask_image": MASK, "strength": strength, "num_inference_steps": 6, **SIZE}
    call["guidance_scale"] = scale
    expected = plain(other, seeds, named(scheduler, pipeline), **call)
    state = begin(denoiser, seeds, prompt="a lake", scheduler=scheduler, **call)
    assert state.task == "inpainting"
    carried = finish_through_bytes(denoiser, state)
    assert torch.equal(finish(denoiser, state), expected)
    assert torch.equal(carried, expected)
    pictures = plain(other, seeds, named(scheduler, pipeline), "pil", **call)
    for drawn, picture in zip(denoiser.decode(state), pictures, strict=True):
        assert apart(drawn, picture) <= 1, "the VAE is given the same numbers, in another order in memory"


def test_a_request_that_names_nothing_gets_the_familys_steps_and_guidance(denoiser: Denoiser) -> None:
    """And is drawn with that guidance as the ordinary pipeline draws: as steps by hand are above."""
    state = begin(denoiser, [1], prompt="a lake", **SIZE)
    assert state.num_steps == denoiser.terms.num_inference_steps
    assert state.guidance_scale == denoiser.terms.guidance_scale


def test_in_half_precision_too_it_is_the_ordinary_pipelines_bit_for_bit(model: str) -> None:
    """As `auto` loads it on a GPU."""
    pipeline = MODELS[model]().to(torch.bfloat16)
    denoiser, call = Denoiser(pipeline), {"num_inference_steps": 3, **SIZE}
    state = DenoiseState.from_bytes(begin(denoiser, [1], prompt="a lake", **call).to_bytes())
    assert state.latents.dtype is (torch.float32 if model == "z-image" else torch.bfloat16)
    assert torch.equal(finish(denoiser, state), plain(pipeline, [1], **call))
    assert [denoiser.decode(state)[0]] == plain(pipeline, [1], output_type="pil", **call)
    denoiser.preview(state)


def test_in_half_precision_too_a_mask_is_filled_in_as_the_ordinary_pipeline_does(model: str) -> None:
    pipeline = MODELS[model]().to(torch.bfloat16)
    other, denoiser = on_pictures(pipeline, "inpainting"), Denoiser(pipeline)
    call = {"image": PICTURE, "mask_image": MASK, "strength": 0.7, "num_inference_steps": 3, **SIZE}
    call["guidance_scale"] = denoiser.terms.guidance_scale
    state = begin(denoiser, [1], prompt="a lake", **call)
    assert torch.equal(finish(denoiser, state), plain(other, [1], **call))


def test_pictures_and_previews(pipeline: Any, denoiser: Denoiser) -> None:
    call = {"height": 192, "width": 256, "num_inference_steps": 2}
    state = begin(denoiser, [1, 2], prompt="a lake", **call)
    denoiser.step(state)
    assert denoiser.preview(state).size == (64, 48)
    finish(denoiser, state)
    assert denoiser.decode(state) == plain(pipeline, [1, 2], output_type="pil", **call)
