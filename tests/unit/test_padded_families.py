"""Krea 2, LongCat-Image and Ovis-Image step by step: what is theirs alone, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Krea2Pipeline, LongCatImageEditPipeline

from distriray.adapters import AdapterSpec
from distriray.denoise import Denoiser
from distriray.denoise.pipelines.registry import family_named
from distriray.errors import InvalidRequest, UnsupportedModel, UnusableAdapter
from distriray.gang.admission import admit
from distriray.gang.config import HostConfig
from distriray.requests import GenerationRequest
from tests.adapters import write
from tests.models import tiny_krea2, tiny_krea2_distilled, tiny_longcat_image, tiny_ovis_image
from tests.unit.deployments.test_pool_state import FACTS
from tests.unit.test_denoise import SIZE, begin, finish, generators

CALL: dict[str, Any] = {"num_inference_steps": 3, **SIZE}
SIGN = "a sign that says 'lake'"


def by_diffusers(pipeline: Any, prompt: str, **call: Any) -> torch.Tensor:
    """Latents of two images."""
    tokens = pipeline(
        prompt=prompt,
        num_images_per_prompt=2,
        generator=generators([1, 2]),
        output_type="latent",
        **CALL,
        **call,
    ).images
    scale = [] if isinstance(pipeline, Krea2Pipeline) else [pipeline.vae_scale_factor]
    latents: torch.Tensor = pipeline._unpack_latents(tokens, CALL["height"], CALL["width"], *scale)
    return latents.squeeze(2) if latents.ndim == 5 else latents


def ours(denoiser: Denoiser, prompt: str, **fields: Any) -> torch.Tensor:
    return finish(denoiser, begin(denoiser, [1, 2], prompt=prompt, **CALL, **fields))


@pytest.mark.parametrize("call", [{}, {"negative_prompt": "fog"}, {"guidance_scale": 0.0}])
@pytest.mark.parametrize("make", [tiny_ovis_image, tiny_longcat_image, tiny_krea2])
def test_guidance_is_the_pipelines(make: Callable[[], Any], call: dict[str, Any]) -> None:
    pipeline = make()
    options = {"enable_prompt_rewrite": False} if make is tiny_longcat_image else {}
    assert torch.equal(
        ours(Denoiser(pipeline), SIGN, **call), by_diffusers(pipeline, SIGN, **call, **options)
    )


def test_what_a_prompt_of_longcat_quotes_is_read_letter_by_letter() -> None:
    """With a tokenizer of a token a letter, which has one for a word besides."""
    pipeline = tiny_longcat_image()
    pipeline.tokenizer.add_tokens(["lake"])
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))
    denoiser = Denoiser(pipeline)
    expected = by_diffusers(pipeline, SIGN, enable_prompt_rewrite=False)
    assert torch.equal(ours(denoiser, SIGN), expected)
    plain, quoted = (denoiser._steps.tokens(text)[0].given for text in ("says lake", "says 'lake'"))
    assert (plain, quoted) == (len("says ") + 1, len("says 'lake'"))


def test_nobody_writes_prompts_of_longcat_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_longcat_image()
    monkeypatch.setattr(pipeline.text_encoder, "generate", None)
    assert ours(Denoiser(pipeline), SIGN).isfinite().all()


def test_krea2_guides_from_a_scale_of_0_and_reads_the_layers_that_its_configuration_names() -> None:
    pipeline = tiny_krea2()
    denoiser = Denoiser(pipeline)
    without, little = (ours(denoiser, SIGN, guidance_scale=scale) for scale in (0.0, 0.5))
    assert not torch.equal(without, little)
    others = Krea2Pipeline(**pipeline.components, text_encoder_select_layers=(0, 1, 3))
    drawn = ours(Denoiser(others), SIGN)
    assert torch.equal(drawn, by_diffusers(others, SIGN)) and not torch.equal(drawn, ours(denoiser, SIGN))


def test_the_krea2_that_was_distilled_is_shifted_alike_for_all_sizes_and_refuses_guidance() -> None:
    pipeline = tiny_krea2_distilled()
    denoiser = Denoiser(pipeline)
    assert (denoiser.terms.num_inference_steps, denoiser.terms.guidance_scale) == (8, 0.0)
    assert torch.equal(ours(denoiser, SIGN), by_diffusers(pipeline, SIGN, guidance_scale=0.0))
    for field, value in (("guidance_scale", 2.0), ("negative_prompt", "fog")):
        with pytest.raises(InvalidRequest, match=f"^{field}: this model was distilled") as error:
            begin(denoiser, [1], prompt=SIGN, **CALL, **{field: value})
        assert error.value.param == field


@pytest.mark.parametrize("make", [tiny_ovis_image, tiny_longcat_image, tiny_krea2])
def test_what_they_have_nothing_for_is_refused_before_a_worker_hears_of_it(make: Callable[[], Any]) -> None:
    denoiser = Denoiser(make())
    facts = replace(FACTS, terms=denoiser.terms, guides=denoiser.guides)
    for field, value in (("strength", 0.5), ("clip_skip", 1), ("guidance_rescale", 0.5), ("prompt_2", "x")):
        with pytest.raises(InvalidRequest) as error:
            admit(GenerationRequest(prompt=SIGN, **{field: value}), HostConfig(workers=2), facts)
        assert error.value.param == field


def test_patches_of_another_size_are_refused() -> None:
    pipeline = tiny_krea2()
    pipeline.register_to_config(patch_size=4)
    with pytest.raises(UnsupportedModel, match="a Krea2Pipeline with patch_size 4; known is 2"):
        Denoiser(pipeline)


def test_the_longcat_that_edits_is_of_no_family() -> None:
    assert family_named(LongCatImageEditPipeline.__name__) is None
    assert family_named("LongCatImagePipeline") == "LongCatImage"


@pytest.mark.parametrize("make", [tiny_ovis_image, tiny_longcat_image])
def test_that_diffusers_reads_no_adapters_for_them_is_said(make: Callable[[], Any], tmp_path: Path) -> None:
    pipeline = make()
    path = write(tmp_path / "ink.safetensors", pipeline, 1)
    with pytest.raises(UnusableAdapter, match=f"diffusers' {type(pipeline).__name__} reads no LoRA"):
        Denoiser(pipeline).adapters.check(AdapterSpec(name="ink", source=str(path)))
