"""HunyuanImage step by step: its guiders and their memory, what prompts quote, what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AdaptiveProjectedMixGuidance, ClassifierFreeGuidance, HunyuanImageRefinerPipeline

from deployments.models import terms_of
from distriray.adapters import AdapterSpec
from distriray.denoise import Denoiser, DenoiseState
from distriray.errors import InvalidRequest, UnsupportedModel, UnusableAdapter
from distriray.models import ModelSpec
from tests.adapters import write
from tests.guiding import guiders_with
from tests.models import save, tiny_hunyuan_image, tiny_hunyuan_image_distilled
from tests.unit.test_denoise import (
    SIZE,
    begin,
    failing_at_the_end,
    finish,
    finish_through_bytes,
    generators,
)

STEPS = 5
"""More than either guider's first ones, which the request's scale is of."""
PLAIN, QUOTING = "a lake", "a sign that says 'lake' and \"fog\""


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_hunyuan_image()


def drawn_by_diffusers(pipeline: Any, prompt: str, **call: Any) -> torch.Tensor:
    """Of two images, by guiders with what is said of guidance, which the pipeline has again afterwards."""
    guidance = {name: call.pop(name) for name in list(call) if name.startswith("guidance_")}
    with guiders_with(pipeline, **guidance):
        latents: torch.Tensor = pipeline(
            prompt,
            num_inference_steps=STEPS,
            num_images_per_prompt=2,
            generator=generators([1, 2]),
            output_type="latent",
            **SIZE,
            **call,
        ).images
    return latents


def state_of(denoiser: Denoiser, prompt: str, **fields: Any) -> DenoiseState:
    return begin(denoiser, [1, 2], prompt=prompt, num_inference_steps=STEPS, **SIZE, **fields)


@pytest.mark.parametrize("prompt", [PLAIN, QUOTING])
@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 1.0},
        {"negative_prompt": "fog"},
        {"negative_prompt": "'fog' over all of the lake"},
        {"guidance_scale": 2.0, "guidance_rescale": 0.7},
    ],
)
def test_guidance_is_the_pipelines_whatever_is_quoted_also_through_bytes(
    pipeline: Any, prompt: str, call: dict[str, Any]
) -> None:
    expected = drawn_by_diffusers(pipeline, prompt, **call)
    denoiser = Denoiser(pipeline)
    state = state_of(denoiser, prompt, **call)
    carried = finish_through_bytes(denoiser, state)
    assert torch.equal(finish(denoiser, state), expected)
    assert torch.equal(carried, expected)


@pytest.mark.parametrize("momentum", [None, 0.5])
@pytest.mark.parametrize("alone", [True, False])
def test_guiders_of_other_numbers_and_one_for_all_prompts_are_followed(
    momentum: float | None, alone: bool
) -> None:
    pipeline = tiny_hunyuan_image()
    options = {"adaptive_projected_guidance_start_step": 0, "eta": 0.5, "use_original_formulation": True}
    guider = AdaptiveProjectedMixGuidance(adaptive_projected_guidance_momentum=momentum, **options)
    pipeline.register_modules(guider=guider, ocr_guider=None if alone else guider)
    expected, denoiser = drawn_by_diffusers(pipeline, QUOTING), Denoiser(pipeline)
    assert torch.equal(finish(denoiser, state_of(denoiser, QUOTING)), expected)


def test_a_step_that_fails_takes_back_what_guidance_remembers(pipeline: Any) -> None:
    denoiser = Denoiser(pipeline)
    state = state_of(denoiser, PLAIN)
    denoiser.step(state)
    before, remembered = state.to_bytes(), state.values["momentum"]
    with failing_at_the_end(state.scheduler, "step"), pytest.raises(Exception):  # noqa: B017
        denoiser.step(state)
    assert state.to_bytes() == before and torch.equal(state.values["momentum"], remembered)
    assert torch.equal(finish(denoiser, state), drawn_by_diffusers(pipeline, PLAIN))


def test_prompts_that_quote_have_a_guider_of_their_own(pipeline: Any) -> None:
    denoiser = Denoiser(pipeline)
    said = [state_of(denoiser, prompt).values["guider"] for prompt in (PLAIN, QUOTING)]
    assert said == ["guider", "ocr_guider"]


def test_the_network_of_the_distilled_one_is_told_the_scale_and_where_each_step_goes() -> None:
    pipeline, told = tiny_hunyuan_image_distilled(), list[tuple[float, ...]]()
    names = "timestep", "timestep_r", "guidance"
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args, given: told.append(tuple(float(given[name][0]) for name in names)), with_kwargs=True
    )
    denoiser = Denoiser(pipeline)
    finish(denoiser, state_of(denoiser, PLAIN, guidance_scale=2.5))
    ours = told.copy()
    told.clear()
    drawn_by_diffusers(pipeline, PLAIN, distilled_guidance_scale=2.5)
    assert ours == told and ours[0][0] == 1000.0 and ours[-1][1] == 0.0
    assert {scale for _, _, scale in ours} == {2500.0}


def test_terms_are_those_of_the_base_the_distilled_one_and_one_without_guiders(tmp_path: Path) -> None:
    base, distilled, unguided = tiny_hunyuan_image(), tiny_hunyuan_image_distilled(), tiny_hunyuan_image()
    unguided.register_modules(guider=None, ocr_guider=None)
    guiders = {name: getattr(base, name).new(guidance_scale=4.5) for name in ("guider", "ocr_guider")}
    base.register_modules(**guiders)
    for pipeline, steps, scale, guides in (
        (base, 50, 4.5, True),
        (distilled, 8, 3.25, False),
        (unguided, 50, 1.0, False),
    ):
        denoiser = Denoiser(pipeline)
        assert (denoiser.terms.num_inference_steps, denoiser.terms.guidance_scale) == (steps, scale)
        assert denoiser.guides == guides == ("negative_prompt" not in denoiser.terms.lacks)
        assert ("guidance_scale" in denoiser.terms.lacks) == (scale == 1.0)
        folder = tmp_path / str(scale)
        save(pipeline, folder)
        assert terms_of(ModelSpec(name=str(folder))) == denoiser.terms
    with pytest.raises(InvalidRequest, match="reads what the prompt quotes") as refused:
        state_of(Denoiser(base), PLAIN, prompt_2="fog")
    assert refused.value.param == "prompt_2"


def guide_by(name: str, guider: Any) -> Callable[[Any], None]:
    return lambda pipeline: pipeline.register_modules(**{name: guider})


def take_scale(pipeline: Any) -> None:
    pipeline.transformer.register_to_config(guidance_embeds=True)


def forget_scaling(pipeline: Any) -> None:
    pipeline.vae.register_to_config(scaling_factor=None)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (guide_by("guider", ClassifierFreeGuidance()), "ClassifierFreeGuidance as guider; known is Adaptive"),
        (guide_by("ocr_guider", ClassifierFreeGuidance()), "ClassifierFreeGuidance as ocr_guider"),
        (guide_by("guider", None), "with ocr_guider, without guider"),
        (guide_by("guider", AdaptiveProjectedMixGuidance(enabled=False)), "whose guider is off"),
        (guide_by("ocr_guider", AdaptiveProjectedMixGuidance(stop=0.5)), "ocr_guider is off, or not of all"),
        (guide_by("ocr_guider", AdaptiveProjectedMixGuidance(2.0)), "ocr_guider .* has another scale"),
        (guide_by("guider", AdaptiveProjectedMixGuidance(guidance_rescale=0.5)), "guider rescales"),
        (take_scale, "guider and ocr_guider around a network that takes the scale"),
        (forget_scaling, "no scaling_factor"),
        (guide_by("text_encoder_2", None), "without text_encoder_2 cannot be denoised"),
    ],
)
def test_models_that_would_not_be_drawn_rightly_are_refused_by_name(
    change: Callable[[Any], None], says: str
) -> None:
    pipeline = tiny_hunyuan_image()
    change(pipeline)
    with pytest.raises(UnsupportedModel, match=says):
        Denoiser(pipeline)


def test_the_refiner_is_refused_with_a_list_of_what_is_served(pipeline: Any) -> None:
    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")
    refiner = HunyuanImageRefinerPipeline(**{name: pipeline.components[name] for name in parts})
    with pytest.raises(UnsupportedModel, match="HunyuanImageRefinerPipeline cannot .*HunyuanImagePipeline"):
        Denoiser(refiner)


def test_that_diffusers_reads_no_adapters_for_it_is_said(pipeline: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "ink.safetensors", pipeline, 1)
    denoiser = Denoiser(pipeline)
    with pytest.raises(UnusableAdapter, match="diffusers' HunyuanImagePipeline reads no LoRA"):
        denoiser.adapters.check(AdapterSpec(name="ink", source=str(path)))
