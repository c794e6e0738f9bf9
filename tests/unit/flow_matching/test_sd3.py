"""Stable Diffusion 3: what is its alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from distriray.denoise import Denoiser
from distriray.errors import InvalidRequest
from tests.models import tiny_sd3
from tests.unit.flow_matching.families import SMALL, begin
from tests.unit.flow_matching.ordinary import named, plain
from tests.unit.test_denoise import MASK, PICTURE, SIZE, finish


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0, "negative_prompt": "fog"},
        {"guidance_scale": 4.0, "negative_prompt": "fog"},
        {"guidance_scale": 4.0, "clip_skip": 0},
        {"guidance_scale": 4.0, "clip_skip": 1},
    ],
)
def test_guidance_and_clip_skip_are_the_pipelines(sd3: Any, call: dict[str, Any]) -> None:
    denoiser = Denoiser(sd3)
    state = begin(denoiser, [3], **SMALL, **call)
    assert torch.equal(finish(denoiser, state), plain(sd3, [3], num_inference_steps=3, **SIZE, **call))


def test_both_branches_are_one_call_of_the_network(sd3: Any) -> None:
    denoiser, batches = Denoiser(sd3), []
    hook = sd3.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: batches.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        finish(denoiser, begin(denoiser, [1, 2], **SMALL))
        finish(denoiser, begin(denoiser, [1, 2], **SMALL, guidance_scale=1.0))
    finally:
        hook.remove()
    assert batches == [4] * 3 + [2] * 3


def test_rescaled_guidance_has_the_contrast_of_the_prompt_alone(sd3: Any) -> None:
    outputs: list[torch.Tensor] = []
    hook = sd3.transformer.register_forward_hook(lambda _, inputs, output: outputs.append(output[0]))
    try:
        denoiser = Denoiser(sd3)
        state = begin(denoiser, [1, 2], **SMALL, guidance_rescale=1.0)
        denoiser.step(state)
    finally:
        hook.remove()
    _, conditional = outputs[0].chunk(2)
    assert state.network_output is not None
    torch.testing.assert_close(state.network_output.output.std((1, 2, 3)), conditional.std((1, 2, 3)))


def test_t5_reads_the_prompt_where_a_model_has_it() -> None:
    pipeline = tiny_sd3(t5=True)
    denoiser = Denoiser(pipeline)
    latents = finish(denoiser, begin(denoiser, [1], **SMALL))
    own = {"num_inference_steps": 3, "guidance_scale": 7.0, **SIZE}
    assert torch.equal(latents, plain(pipeline, [1], **own))
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    without = Denoiser(pipeline)
    assert not torch.allclose(finish(without, begin(without, [1], **SMALL)), latents, atol=1e-2)


def test_a_shift_by_the_size_is_the_pipelines() -> None:
    pipeline = tiny_sd3()
    # What diffusers takes where another scheduler has lost it.
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=1.16)
    denoiser = Denoiser(pipeline)
    call = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 64, "width": 160}
    for name in (None, "unipc", "dpmpp-2m"):
        state = begin(denoiser, [1], prompt="a lake", scheduler=name, **call)
        assert torch.equal(finish(denoiser, state), plain(pipeline, [1], named(name, pipeline), **call))
    with pytest.raises(InvalidRequest, match="heun cannot shift by the size") as error:
        begin(denoiser, [1], **SMALL, scheduler="heun")
    assert error.value.param == "scheduler"


def test_a_size_beyond_the_models_positions_is_refused_before_a_step_fails(sd3: Any) -> None:
    denoiser = Denoiser(sd3)
    begin(denoiser, [1], **{**SMALL, "height": 384})
    for side in ("height", "width"):
        with pytest.raises(InvalidRequest, match=f"{side} 400 is above 384") as error:
            begin(denoiser, [1], **{**SMALL, side: 400})
        assert error.value.param == side


def test_a_mask_keeps_the_rest_with_latents_of_any_width() -> None:
    """Which the ordinary pipeline refuses."""
    denoiser = Denoiser(tiny_sd3(channels=4))
    state = begin(denoiser, [1, 2], **SMALL, image=PICTURE, mask_image=MASK)
    latents, picture = finish(denoiser, state), state.values["image_latents"]
    assert torch.equal(latents[..., 6:], picture[..., 6:])
    assert not torch.allclose(latents[..., :6], picture[..., :6], atol=0.5)
