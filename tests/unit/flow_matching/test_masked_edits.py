"""Masks of what is edited: diffusers' own numbers where it has a pipeline for it, in gangs too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import (
    Flux2KleinInpaintPipeline,
    FluxKontextInpaintPipeline,
    QwenImageEditInpaintPipeline,
)
from PIL import Image

from distriray.denoise import Denoiser, DenoiseState
from distriray.errors import InvalidRequest
from distriray.gang.admission import admit
from distriray.gang.config import HostConfig
from distriray.requests import GenerationRequest, SamplingParams
from tests.edits import as_taken, editing_of, references, sized
from tests.likeness import LIKENESS, apart, differs
from tests.models import save
from tests.unit.deployments.test_pool_state import FACTS
from tests.unit.flow_matching.families import MODELS
from tests.unit.flow_matching.gangs import Gangs
from tests.unit.flow_matching.ordinary import plain
from tests.unit.gang.runners import Gang
from tests.unit.test_denoise import begin, finish, finish_through_bytes, generators

KINDS: dict[str, Any] = {
    "flux-kontext": FluxKontextInpaintPipeline,
    "flux2-klein": Flux2KleinInpaintPipeline,
    "flux2-klein-distilled": Flux2KleinInpaintPipeline,
    "qwen-image-edit": QwenImageEditInpaintPipeline,
}
"""Those of the models that edit which diffusers has a pipeline for to fill in masks, and that."""
WIDTH, HEIGHT = 160, 96
"""What Qwen-Image-Edit draws here of a picture in that shape (`small_megapixels`)."""
PICTURE = Image.radial_gradient("L").resize((WIDTH, HEIGHT)).convert("RGB")
FURTHER = Image.linear_gradient("L").resize((112, 80)).convert("RGB")
MASK = Image.new("L", PICTURE.size)
MASK.paste(255, (40, 24, 120, 96))
SIZE: dict[str, Any] = {"height": HEIGHT, "width": WIDTH}


def filling(edits: str, pipeline: Any) -> Any:
    """diffusers' pipeline for masks around the same models."""
    other = KINDS[edits].from_pipe(pipeline)
    other.set_progress_bar_config(disable=True)
    if isinstance(other, QwenImageEditInpaintPipeline):  # which encodes a batch's picture for each of it
        encode = other.encode_prompt
        scaled = partial(other.image_processor.resize, height=HEIGHT, width=WIDTH)
        other.encode_prompt = lambda image, **given: encode(image=scaled(image[0]), **given)
    return other


def given(edits: str) -> dict[str, Any]:
    """What only some of those are called with."""
    return {"_auto_resize": False} if edits == "flux-kontext" else {}


@pytest.mark.parametrize("seeds", [[1], [1, 2]])
@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("edits", KINDS)
def test_a_mask_of_what_is_edited_is_filled_in_bit_for_bit_as_the_ordinary_pipeline_does(
    edits: str, strength: float, seeds: list[int]
) -> None:
    pipeline = MODELS[edits]()
    denoiser = Denoiser(pipeline)
    call = {"image": PICTURE, "mask_image": MASK, "strength": strength, "num_inference_steps": 6, **SIZE}
    call["guidance_scale"] = denoiser.terms.guidance_scale
    expected = plain(filling(edits, pipeline), seeds, **call, **given(edits))
    state = begin(denoiser, seeds, prompt="a lake", **call)
    assert state.task == "inpainting" and state.num_steps == (6 if strength == 1.0 else 5)
    carried = finish_through_bytes(denoiser, state)
    assert torch.equal(finish(denoiser, state), expected)
    assert torch.equal(carried, expected)


@pytest.mark.parametrize("edits", KINDS)
def test_a_picture_of_another_size_is_scaled_as_the_ordinary_pipeline_does(edits: str) -> None:
    """Which draws that size, whatever it is asked for."""
    pipeline = MODELS[edits]()
    denoiser, size = Denoiser(pipeline), (171, 103)
    call = {"image": PICTURE.resize(size), "mask_image": MASK.resize(size), "num_inference_steps": 2, **SIZE}
    call |= {"strength": 1.0, "guidance_scale": denoiser.terms.guidance_scale}
    expected = plain(filling(edits, pipeline), [1], **call, **given(edits))
    if edits.startswith("flux2"):  # the default of others is a megapixel, which is small for diffusers alone
        call = {name: value for name, value in call.items() if name not in SIZE}
    state = begin(denoiser, [1], prompt="a lake", **call)
    assert torch.equal(finish(denoiser, state), expected)


def test_kontext_in_a_shape_that_it_was_trained_in_has_the_ordinary_pipelines_numbers() -> None:
    pipeline = MODELS["flux-kontext"]()
    denoiser, size = Denoiser(pipeline), {"height": 96, "width": 144}
    call = {"image": PICTURE, "mask_image": MASK, "strength": 1.0, "num_inference_steps": 2, **size}
    expected = plain(filling("flux-kontext", pipeline), [1], **call)
    state = begin(denoiser, [1], prompt="a lake", **call)
    assert torch.equal(finish(denoiser, state), expected)
    assert any("image of 160x96 is stretched to 144x96" in said for said in state.warnings)


def test_further_pictures_are_only_shown_as_the_ordinary_pipeline_does() -> None:
    pipeline = MODELS["flux2-klein"]()
    denoiser = Denoiser(pipeline)
    call = {"image": PICTURE, "mask_image": MASK, "strength": 0.7, "num_inference_steps": 3, **SIZE}
    call["guidance_scale"] = denoiser.terms.guidance_scale
    expected = plain(filling("flux2-klein", pipeline), [1, 2], **call, image_reference=FURTHER)
    state = begin(denoiser, [1, 2], prompt="a lake", references=references([FURTHER]), **call)
    assert torch.equal(finish(denoiser, state), expected)
    alone = begin(denoiser, [1, 2], prompt="a lake", **call)
    assert not torch.equal(finish(denoiser, alone), expected)


BLENDED: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "flux2-dev": lambda pipeline, latents: pipeline._pack_latents(latents),
    "longcat-image-edit": lambda pipeline, latents: pipeline._pack_latents(latents, *latents.shape),
    "qwen-image-edit-plus": lambda pipeline, latents: pipeline._pack_latents(latents, *latents.shape),
}
"""Those that diffusers has no such pipeline for, and how theirs packs latents."""


def blended(edits: str, pipeline: Any, state: DenoiseState, skipped: int, **call: Any) -> torch.Tensor:
    """Tokens by the ordinary pipeline, with the blend of those that fill in masks after each of its steps.

    What it begins from, and what it keeps, are those of a state that was prepared.
    """
    pack, steps = partial(BLENDED[edits], pipeline), call["num_inference_steps"]
    kept, noise = pack(state.values["image_latents"]), pack(state.values["noise"])
    mask = pack(state.values["mask"].expand(1, *state.latents.shape[1:]))
    latents, scheduler = list[torch.Tensor](), pipeline.scheduler
    advance = scheduler.step

    def blend(*arguments: Any, **options: Any) -> tuple[torch.Tensor]:
        (drawn,), left = advance(*arguments, **options), kept
        following = len(latents) + 1
        if following < steps - skipped:
            left = scheduler.scale_noise(kept, scheduler.timesteps[following : following + 1], noise)
        latents.append((1 - mask) * left + mask * drawn)
        return (latents[-1],)

    with mock.patch.object(scheduler, "step", blend), sized(pipeline, call) as given:
        pipeline(
            prompt="a lake",
            sigmas=np.linspace(1.0, 1 / steps, steps)[skipped:],
            latents=state.latents if edits == "flux2-dev" else pack(state.latents),
            num_images_per_prompt=state.batch,
            generator=generators([1] * state.batch),
            output_type="latent",
            **given,
        )
    assert torch.equal(pipeline.scheduler.timesteps, state.values["timesteps"])
    sigma = pipeline.scheduler.sigmas[0]
    assert torch.equal(pack(state.latents), sigma * noise + (1.0 - sigma) * kept)
    return latents[-1]


@pytest.mark.parametrize("further", [[], [FURTHER]])
@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("edits", BLENDED)
def test_where_diffusers_has_no_such_pipeline_the_blend_is_that_of_those_that_it_has(
    edits: str, strength: float, further: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = MODELS[edits]()
    denoiser = Denoiser(pipeline)
    if further and editing_of(denoiser).max_references == 1:
        pytest.skip("it edits one picture")
    call: dict[str, Any] = {"num_inference_steps": 6, **SIZE}
    own = {"image": PICTURE, "mask_image": MASK, "strength": strength, "references": references(further)}
    # FLUX.2's encodes a picture alone, which in a batch is other sums of the same numbers.
    seeds = [1] if edits == "flux2-dev" else [1, 2]
    state = begin(denoiser, seeds, prompt="a lake", **own, **call)
    encode, seen = pipeline._encode_vae_image, list[torch.Tensor]()

    def encoded(image: torch.Tensor, generator: Any) -> torch.Tensor:
        seen.append(encode(image=image, generator=generator))
        kept = state.values["image_latents"]
        return seen[-1] if len(seen) > 1 else kept.reshape(len(kept), *seen[0].shape[1:])

    if edits == "qwen-image-edit-plus":  # which encodes without noise, where Qwen-Image-Edit's for masks does
        monkeypatch.setattr(pipeline, "_encode_vae_image", encoded)
        call |= {"true_cfg_scale": denoiser.terms.guidance_scale, "negative_prompt": " "}
    call["image"] = as_taken(denoiser, [PICTURE, *further])
    expected = blended(edits, pipeline, state, 1 if strength < 1 else 0, **call)
    assert torch.equal(BLENDED[edits](pipeline, finish(denoiser, state)), expected)


@pytest.mark.parametrize("edits", [*KINDS, *BLENDED])
def test_a_gang_in_sync_fills_in_a_mask_as_one_device_does_also_if_it_changes_in_the_middle(
    edits: str,
) -> None:
    gangs = Gangs(MODELS[edits], exchange="sync", cfg_parallel=False)
    denoiser = Denoiser(MODELS[edits]())
    further = [FURTHER] if editing_of(denoiser).max_references > 1 else []
    call = {"image": PICTURE, "mask_image": MASK, "num_inference_steps": 4, "strength": 0.8, **SIZE}
    call |= {"guidance_scale": denoiser.terms.guidance_scale}
    own = {"references": references(further)}
    (alone,) = gangs.draw((1,), **call, **own)
    if edits in KINDS:
        theirs = {"image_reference": further[0]} if further else {}
        expected = plain(filling(edits, denoiser._pipeline), [1], **call, **theirs, **given(edits))
        assert differs(alone.latents, expected) <= LIKENESS
    for sizes in ((2,), (2, 1), (2, 4, 1)):
        for drawn in gangs.draw(sizes, **call, **own):
            assert differs(drawn.latents, alone.latents) <= LIKENESS, sizes
            assert apart(drawn.picture, alone.picture) <= 1, sizes


@pytest.mark.parametrize("edits", KINDS)
def test_in_half_precision_too_a_mask_is_filled_in_as_the_ordinary_pipeline_does(edits: str) -> None:
    pipeline = MODELS[edits]().to(torch.bfloat16)
    denoiser = Denoiser(pipeline)
    call = {"image": PICTURE, "mask_image": MASK, "strength": 0.7, "num_inference_steps": 3, **SIZE}
    call["guidance_scale"] = denoiser.terms.guidance_scale
    expected = plain(filling(edits, pipeline), [1], **call, **given(edits))
    state = begin(denoiser, [1], prompt="a lake", **call)
    assert torch.equal(finish(denoiser, state), expected)


@pytest.mark.parametrize("edits", [*KINDS, *BLENDED])
def test_what_is_kept_is_what_is_shown_in_the_size_that_is_drawn(edits: str) -> None:
    """Whatever the picture's own: what lies outside of the mask is in one place for the network."""
    denoiser = Denoiser(MODELS[edits]())
    call = {"image": PICTURE, "mask_image": MASK, "num_inference_steps": 2, "height": 64, "width": 80}
    state = begin(denoiser, [1], prompt="a lake", **call)
    kept, shown = state.values["image_latents"], state.values["references"]
    tokens = kept.flatten(2).transpose(1, 2)
    if not edits.startswith("flux2"):
        tokens = denoiser._pipeline._pack_latents(kept, *kept.shape)
    assert torch.equal(shown, tokens) and shown.shape[1] == 64 * 80 // 16**2
    latents, outside = finish(denoiser, state), (state.values["mask"] == 0).expand_as(kept)
    assert torch.equal(latents[outside], kept[outside])
    inside = (state.values["mask"] == 1).expand_as(kept)
    assert not torch.allclose(latents[inside], kept[inside], atol=0.5)
    assert any("image of 160x96 is stretched to 80x64" in said for said in state.warnings)


@pytest.mark.parametrize("edits", [*KINDS, *BLENDED])
def test_a_mask_without_an_image_is_of_the_first_of_the_references(edits: str) -> None:
    denoiser = Denoiser(MODELS[edits]())
    call = {"mask_image": MASK, "num_inference_steps": 2, **SIZE}
    by_image = begin(denoiser, [1], prompt="a lake", image=PICTURE, **call)
    by_reference = begin(denoiser, [1], prompt="a lake", references=references([PICTURE]), **call)
    assert torch.equal(finish(denoiser, by_image), finish(denoiser, by_reference))


@pytest.mark.parametrize("edits", [*KINDS, *BLENDED])
def test_a_masked_request_is_settled_once_and_knows_its_size_and_steps(edits: str) -> None:
    denoiser = Denoiser(MODELS[edits]())
    terms, unit = denoiser.terms, denoiser.sizes.unit
    asked = SamplingParams(prompt="x", image=PICTURE, mask_image=MASK)
    without = terms.settle(SamplingParams(prompt="x", image=PICTURE), (1024, 1024), unit)
    settled = terms.settle(asked, (1024, 1024), unit)
    assert (settled.width, settled.height) == (without.width, without.height)
    assert settled.strength == 1.0 and terms.settle(settled, (1024, 1024), unit) == settled
    for steps, strength in ((2, 0.5), (7, 0.3), (10, 0.3), (100, 0.29), (30, 1.0)):
        named = {"strength": strength, "num_inference_steps": steps, "seed": 1, **SIZE}
        state = denoiser.prepare(asked.model_copy(update=named))
        params = terms.settle(asked.model_copy(update=named), (1024, 1024), unit)
        assert params.num_steps(denoiser.own_steps, rounds_up=terms.rounds_up) == state.num_steps


@pytest.mark.parametrize("edits", [*KINDS, *BLENDED])
def test_the_pixels_that_a_host_predicts_are_those_of_the_tokens_that_are_shown(
    edits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # of `small_megapixels`
    denoiser = Denoiser(MODELS[edits]())
    editing, unit = editing_of(denoiser), denoiser.sizes.unit
    facts = replace(FACTS, terms=denoiser.terms, size_unit=unit, default_size=(1024, 1024))
    further = references([FURTHER] if editing.max_references > 1 else [])
    fields: dict[str, Any] = {"image": PICTURE, "mask_image": MASK, "references": further, **SIZE}
    admitted = admit(GenerationRequest(prompt="x", seed=1, **fields), HostConfig(), facts)
    shown = denoiser.prepare(admitted.request).values["references"]
    assert admitted.shown_pixels == pytest.approx(shown.shape[1] * unit**2, rel=0.02)
    assert editing.most_exchanged_pixels(4, 4096**2) == 4096**2 + 2**20 * (min(4, editing.max_references) - 1)


@pytest.mark.parametrize("edits", ["flux3", "flux3-distilled", "qwen-image-2.1"])
def test_models_whose_masks_are_not_known_refuse_them_by_name(edits: str) -> None:
    with pytest.raises(InvalidRequest, match="mask_image: this model's family fills in no masks") as error:
        begin(Denoiser(MODELS[edits]()), [1], prompt="a lake", image=PICTURE, mask_image=MASK, **SIZE)
    assert error.value.param == "mask_image"


@pytest.mark.parametrize("edits", KINDS)
def test_the_pipelines_for_masks_are_served_as_those_that_edit(edits: str) -> None:
    pipeline = MODELS[edits]()
    denoiser, other = Denoiser(pipeline), Denoiser(filling(edits, pipeline))
    assert denoiser.family == other.family
    call = {"image": PICTURE, "num_inference_steps": 2, **SIZE}
    for masked in ({}, {"mask_image": MASK}):
        one, two = (begin(each, [1], prompt="a lake", **call, **masked) for each in (denoiser, other))
        assert torch.equal(finish(denoiser, one), finish(other, two))


def test_a_gang_of_runners_fills_in_a_mask_of_what_it_edits_and_goes_on_without_pictures(
    tmp_path: Path,
) -> None:
    """As a host asks it: an order of a request that is settled, with its pictures beside it."""
    pipeline = MODELS["flux2-klein-distilled"]()
    save(pipeline, tmp_path)
    gang, call = Gang(tmp_path, 2), {"strength": 0.8, "num_inference_steps": 4, **SIZE}
    facts = replace(FACTS, terms=Denoiser(pipeline).terms, size_unit=16)
    asked = {"image": PICTURE, "mask_image": MASK, "references": references([FURTHER]), **call}
    settled = admit(GenerationRequest(prompt="a lake", seed=3, **asked), HostConfig(), facts).request
    fields = {name: getattr(settled, name) for name in SamplingParams.model_fields}
    (drawn,) = gang.run(**fields)[0].images or ()
    state = begin(Denoiser(pipeline), [3], prompt="a lake", **asked)
    (gone_on,) = gang.run(blob=state.to_bytes(), **fields)[0].images or ()
    theirs = {"image": PICTURE, "mask_image": MASK, "image_reference": FURTHER, "guidance_scale": 1.0, **call}
    other = filling("flux2-klein-distilled", pipeline)
    (expected,) = plain(other, [3], output_type="pil", **theirs)
    assert apart(drawn, expected) <= 1 and apart(gone_on, expected) <= 1
