"""Krea 2, LongCat-Image and Ovis-Image step by step: what is theirs alone, and what is refused by name.

Of LongCat-Image the one that edits too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Krea2Pipeline
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit as diffusers_edit
from PIL import Image

from distriray.adapters import AdapterSpec
from distriray.denoise import Denoiser
from distriray.errors import InvalidRequest, UnsupportedModel, UnusableAdapter
from distriray.gang.admission import admit
from distriray.gang.config import HostConfig
from distriray.picture import Picture
from distriray.requests import GenerationRequest
from tests.adapters import write
from tests.edits import SHOWN, shown, sized
from tests.models import (
    tiny_krea2,
    tiny_krea2_distilled,
    tiny_longcat_image,
    tiny_longcat_image_edit,
    tiny_ovis_image,
)
from tests.unit.deployments.test_pool_state import FACTS
from tests.unit.test_denoise import SIZE, begin, finish, generators

CALL: dict[str, Any] = {"num_inference_steps": 3, **SIZE}
SIGN = "a sign that says 'lake'"


def by_diffusers(pipeline: Any, prompt: str, **call: Any) -> torch.Tensor:
    """Latents of two images."""
    if hasattr(pipeline, "text_processor"):
        edits = pipeline.text_processor is not None
        call |= {"image": SHOWN} if edits else {"enable_prompt_rewrite": False}
    with sized(pipeline, {**CALL, **call}) as given:
        tokens = pipeline(
            prompt=prompt,
            num_images_per_prompt=2,
            generator=generators([1, 2]),
            output_type="latent",
            **given,
        ).images
    scale = [] if isinstance(pipeline, Krea2Pipeline) else [pipeline.vae_scale_factor]
    latents: torch.Tensor = pipeline._unpack_latents(tokens, CALL["height"], CALL["width"], *scale)
    return latents.squeeze(2) if latents.ndim == 5 else latents


def ours(denoiser: Denoiser, prompt: str, **fields: Any) -> torch.Tensor:
    return finish(denoiser, begin(denoiser, [1, 2], prompt=prompt, **CALL, **shown(denoiser, **fields)))


@pytest.mark.parametrize("call", [{}, {"negative_prompt": "fog"}, {"guidance_scale": 0.0}])
@pytest.mark.parametrize("make", [tiny_ovis_image, tiny_longcat_image, tiny_longcat_image_edit, tiny_krea2])
def test_guidance_is_the_pipelines(make: Callable[[], Any], call: dict[str, Any]) -> None:
    pipeline = make()
    assert torch.equal(ours(Denoiser(pipeline), SIGN, **call), by_diffusers(pipeline, SIGN, **call))


@pytest.mark.parametrize("make", [tiny_longcat_image, tiny_longcat_image_edit])
def test_what_a_prompt_of_longcat_quotes_is_read_letter_by_letter(make: Callable[[], Any]) -> None:
    """With a tokenizer of a token a letter, which has one for a word besides."""
    pipeline = make()
    pipeline.tokenizer.add_tokens(["lake"])
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))
    denoiser = Denoiser(pipeline)
    assert torch.equal(ours(denoiser, SIGN), by_diffusers(pipeline, SIGN))
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


@pytest.mark.parametrize("make", [tiny_ovis_image, tiny_longcat_image, tiny_longcat_image_edit, tiny_krea2])
def test_what_they_have_nothing_for_is_refused_before_a_worker_hears_of_it(make: Callable[[], Any]) -> None:
    denoiser = Denoiser(make())
    facts = replace(FACTS, terms=denoiser.terms, guides=denoiser.guides)
    for field, value in (("strength", 0.5), ("clip_skip", 1), ("guidance_rescale", 0.5), ("prompt_2", "x")):
        asked = shown(denoiser, prompt=SIGN, **{field: value})
        with pytest.raises(InvalidRequest) as error:
            admit(GenerationRequest(**asked), HostConfig(workers=2), facts)
        assert error.value.param == field


def test_patches_of_another_size_are_refused() -> None:
    pipeline = tiny_krea2()
    pipeline.register_to_config(patch_size=4)
    with pytest.raises(UnsupportedModel, match="a Krea2Pipeline with patch_size 4; known is 2"):
        Denoiser(pipeline)


def test_what_longcat_cannot_edit_is_refused_by_name() -> None:
    """A text of more than 512 tokens too, of which diffusers' own pipeline fails to warn."""
    denoiser = Denoiser(tiny_longcat_image_edit())
    two = [{"image": Picture.of(SHOWN)}] * 2
    for fields, param, says in (
        ({}, "image", "this model edits pictures, and needs an image"),
        ({"references": two}, "references", "are 2 pictures; this model edits at most 1"),
        ({"image": SHOWN, "prompt": "x" * 513}, "prompt", "prompt has 513 tokens, and this model reads 512"),
        ({"image": SHOWN, "negative_prompt": "x" * 513}, "negative_prompt", "has 513 tokens"),
        ({"image": SHOWN, "width": 13 * 1024}, "width", "13312x64 pixels have sides of more than 1 to 200"),
    ):
        with pytest.raises(InvalidRequest, match=says) as error:
            begin(denoiser, [1], **{"prompt": SIGN, **CALL, **fields})
        assert error.value.param == param
    begin(denoiser, [1], image=SHOWN, **{"prompt": "x" * 512, **CALL})


def test_what_longcat_edits_is_shown_in_the_size_that_is_drawn_which_is_diffusers_own_by_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()  # of `small_megapixels`
    denoiser = Denoiser(tiny_longcat_image_edit())
    editing = denoiser.terms.editing
    assert editing is not None
    for wide, high in ((64, 64), (1024, 1024), (1920, 1080), (1080, 1920), (500, 333), (120, 88), (512, 64)):
        drawn = diffusers_edit.calculate_dimensions(1024 * 1024, wide / high)
        assert editing.drawn_size((wide, high), 16) == drawn
    facts = replace(FACTS, terms=denoiser.terms, size_unit=16)
    admitted = admit(GenerationRequest(prompt=SIGN, image=SHOWN, **SIZE), HostConfig(), facts)
    assert admitted.shown_pixels == SIZE["height"] * SIZE["width"]
    assert [editing.most_exchanged_pixels(count, 512**2) for count in (0, 1, 4)] == [0, 512**2, 512**2]
    (said,) = begin(denoiser, [1], prompt=SIGN, image=Image.new("RGB", (128, 64)), **CALL).warnings
    assert said == "image of 128x64 is stretched to {width}x{height}, of other proportions".format(**SIZE)


@pytest.mark.parametrize("make", [tiny_ovis_image, tiny_longcat_image, tiny_longcat_image_edit])
def test_that_diffusers_reads_no_adapters_for_them_is_said(make: Callable[[], Any], tmp_path: Path) -> None:
    pipeline = make()
    path = write(tmp_path / "ink.safetensors", pipeline, 1)
    with pytest.raises(UnusableAdapter, match=f"diffusers' {type(pipeline).__name__} reads no LoRA"):
        Denoiser(pipeline).adapters.check(AdapterSpec(name="ink", source=str(path)))
