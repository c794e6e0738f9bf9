"""Models that are refused by what they lack or have otherwise."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import (
    AutoencoderTiny,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    StableDiffusion3PAGPipeline,
)

from distriray.denoise import Denoiser
from distriray.denoise.schedulers import make_scheduler
from distriray.errors import UnsupportedModel
from distriray.steps import SchedulerName
from tests.models import tiny_sdxl
from tests.unit.flow_matching.families import MODELS


def test_a_model_with_a_scheduler_of_the_other_kind_or_of_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, pipeline: Any
) -> None:
    for kind, says in (
        (EulerDiscreteScheduler, "EulerDiscreteScheduler follows noise, and .* denoises by flow matching"),
        (FlowMatchLCMScheduler, "own scheduler FlowMatchLCMScheduler cannot be part of a state"),
    ):
        monkeypatch.setattr(pipeline, "scheduler", kind.from_config(pipeline.scheduler.config))
        with pytest.raises(UnsupportedModel, match=says):
            Denoiser(pipeline)
    sdxl = tiny_sdxl()
    sdxl.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UnsupportedModel, match="follows flow matching, and .* denoises by noise"):
        Denoiser(sdxl)


@pytest.mark.parametrize(
    ("model", "kind"), [("flux-dev", "heun"), ("qwen-image", "unipc"), ("chroma", "dpmpp-2m")]
)
def test_a_model_with_a_scheduler_that_its_pipeline_steps_otherwise_is_refused(
    model: str, kind: SchedulerName
) -> None:
    """diffusers' pipeline names the noise levels of its steps, which that scheduler has otherwise or not."""
    pipeline = MODELS[model]()
    pipeline.scheduler = make_scheduler(FlowMatchEulerDiscreteScheduler(), kind)
    with pytest.raises(UnsupportedModel, match=r"is not one for .*; save the model with .*FlowMatchEuler"):
        Denoiser(pipeline)


@pytest.mark.parametrize("model", ["sd3", "flux-dev"])
def test_models_that_cannot_be_drawn_from_are_refused_by_name(model: str) -> None:
    textless, wide, shiftless, other = (MODELS[model]() for _ in range(4))
    textless.register_modules(text_encoder_2=None)
    with pytest.raises(UnsupportedModel, match="without text_encoder_2 cannot"):
        Denoiser(textless)
    wide.vae.register_to_config(latent_channels=8)
    channels = wide.transformer.config.in_channels
    with pytest.raises(UnsupportedModel, match=f"a transformer of {channels} channels; with latents of 8"):
        Denoiser(wide)
    shiftless.vae.register_to_config(shift_factor=None)
    with pytest.raises(UnsupportedModel, match="no shift_factor"):
        Denoiser(shiftless)
    other.register_modules(vae=AutoencoderTiny())
    with pytest.raises(UnsupportedModel, match="with AutoencoderTiny; known is AutoencoderKL"):
        Denoiser(other)


def test_pipelines_of_other_classes_are_refused_with_a_list_of_what_is_served(sd3: Any) -> None:
    listed = (
        r"Stable Diffusion 3 and 3.5 \(StableDiffusion3Pipeline, StableDiffusion3Img2ImgPipeline, "
        r"StableDiffusion3InpaintPipeline\)"
    )
    with pytest.raises(UnsupportedModel, match=f"StableDiffusion3PAGPipeline cannot .*{listed}"):
        Denoiser(StableDiffusion3PAGPipeline.from_pipe(sd3))
