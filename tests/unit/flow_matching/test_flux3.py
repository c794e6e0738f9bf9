"""FLUX.3: what is its alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from diffusers import AdaptiveProjectedGuidance

from distriray.denoise import Denoiser
from distriray.errors import InvalidRequest, UnsupportedModel
from tests.models import TEXT_WIDTH, tiny_flux3, tiny_flux3_distilled, tiny_flux3_transformer
from tests.unit.flow_matching.families import SMALL, begin
from tests.unit.flow_matching.ordinary import check_numbers
from tests.unit.test_denoise import finish


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 1.0},
        {"negative_prompt": "fog"},
        {"negative_prompt": "fog over all of the lake, " * 8},  # of more tokens than the prompt is padded to
        {"guidance_rescale": 0.7},
    ],
)
def test_guidance_of_flux3_is_the_pipelines(call: dict[str, Any]) -> None:
    check_numbers(tiny_flux3(), **call)


def test_flux3_knows_the_base_and_the_distilled_one() -> None:
    base, distilled = Denoiser(tiny_flux3()), Denoiser(tiny_flux3_distilled())
    assert (base.terms.num_inference_steps, base.terms.guidance_scale) == (50, 3.5)
    assert (distilled.terms.num_inference_steps, distilled.terms.guidance_scale) == (16, 1.0)
    assert (base.guides, distilled.guides) == (True, False)
    state = begin(base, [1], **SMALL)
    with pytest.raises(InvalidRequest, match="Flux3Modular cannot go on with a model of Flux3Distilled"):
        distilled.step(state)


def test_the_network_of_a_distilled_flux3_is_told_where_each_step_goes() -> None:
    pipeline, told = tiny_flux3_distilled(), list[tuple[float, float]]()
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args, given: told.append((float(given["timestep"]), float(given["target_timestep"]))),
        with_kwargs=True,
    )
    denoiser = Denoiser(pipeline)
    finish(denoiser, begin(denoiser, [1], **SMALL))
    (first, second, third) = told
    assert 1.0 == first[0] > first[1] == second[0] > second[1] == third[0] > third[1] == 0.0


def change_pad(pipeline: Any) -> None:
    pipeline._blocks.sub_blocks["text_encoder"].pad_multiple = 40


def drop_decoder(pipeline: Any) -> None:
    pipeline._blocks.sub_blocks.pop("decode")


def change_guider(pipeline: Any) -> None:
    pipeline.update_components(guider=AdaptiveProjectedGuidance())


def turn_formula(pipeline: Any) -> None:
    pipeline.update_components(guider=pipeline.guider.new(use_original_formulation=True))


def change_network(pipeline: Any) -> None:
    network = tiny_flux3_transformer(joint_attention_dim=8 * TEXT_WIDTH, flow_map=True)
    pipeline.update_components(transformer=network)


def drop_vae(pipeline: Any) -> None:
    pipeline.update_components(vae=None)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (change_pad, "blocks other than those of Flux3AutoBlocks, or changed ones"),
        (drop_decoder, "blocks other than those of Flux3AutoBlocks"),
        (change_guider, "a guider other than diffusers' ClassifierFreeGuidance"),
        (turn_formula, "a guider other than diffusers' ClassifierFreeGuidance"),
        (change_network, "around a Flux3Transformer2DModel with flow_map"),
        (drop_vae, "without vae cannot be denoised step by step"),
    ],
)
def test_a_flux3_of_another_recipe_is_refused(change: Callable[[Any], None], says: str) -> None:
    pipeline = tiny_flux3()
    change(pipeline)
    with pytest.raises(UnsupportedModel, match=f"Flux3ModularPipeline .*{says}"):
        Denoiser(pipeline)
