"""FLUX.1, FLUX.2 and Chroma: what is theirs alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxFillPipeline, FluxPipeline

from distriray.denoise import Denoiser
from distriray.denoise.schedulers import make_scheduler
from distriray.errors import InvalidRequest, UnsupportedModel
from tests.models import tiny_chroma, tiny_flux, tiny_flux2, tiny_flux_fill, tiny_flux_schnell
from tests.unit.flow_matching.families import SMALL, begin
from tests.unit.flow_matching.ordinary import check_numbers, plain
from tests.unit.test_denoise import PICTURE, SIZE, finish
from tests.unit.test_denoise import begin as begin_as_asked


@pytest.mark.parametrize("scale", [0.0, 1.0, 6.0])
def test_the_scale_of_guidance_is_an_input_of_flux_dev(scale: float) -> None:
    pipeline = tiny_flux()
    denoiser = Denoiser(pipeline)
    call = {"num_inference_steps": 3, "guidance_scale": scale, **SIZE}
    latents = finish(denoiser, begin(denoiser, [3], prompt="a lake", **call))
    assert torch.equal(latents, plain(pipeline, [3], **call))
    assert not torch.equal(latents, plain(pipeline, [3], **{**call, "guidance_scale": 3.5}))


def test_a_scheduler_of_the_models_own_that_begins_from_no_image_is_named() -> None:
    pipeline = tiny_flux()
    pipeline.scheduler = make_scheduler(pipeline.scheduler, "unipc")
    with pytest.raises(InvalidRequest, match="^scheduler UniPCMultistepScheduler cannot begin from an image"):
        begin(Denoiser(pipeline), [1], **SMALL, image=PICTURE)


@pytest.mark.parametrize("make", [tiny_flux, tiny_flux_schnell])
def test_fields_that_ask_flux_for_nothing_are_taken(make: Callable[[], Any]) -> None:
    denoiser = Denoiser(make())
    call = {"guidance_scale": 1.0} if make is tiny_flux_schnell else {}
    nothing = {"negative_prompt": "", "clip_skip": 0, "guidance_rescale": 0.0, **call}
    one, other = begin(denoiser, [1], **SMALL), begin(denoiser, [1], **SMALL, **nothing)
    assert torch.equal(finish(denoiser, one), finish(denoiser, other))


def test_flux_schnell_is_known_by_its_network_and_reads_as_many_tokens_as_it_was_trained_with() -> None:
    dev, schnell = Denoiser(tiny_flux()), Denoiser(tiny_flux_schnell())
    assert (dev.terms.num_inference_steps, dev.terms.guidance_scale) == (28, 3.5)
    assert (schnell.terms.num_inference_steps, schnell.terms.guidance_scale) == (4, 0.0)
    assert "guidance_scale" in schnell.terms.lacks and "guidance_scale" not in dev.terms.lacks
    tokens = [len(begin(each, [1], **SMALL).values["txt_ids"]) for each in (dev, schnell)]
    assert tokens == [512, 256]


def test_flux_fill_fills_in_masks_and_is_refused_as_another_flux() -> None:
    denoiser = Denoiser(tiny_flux_fill())
    assert (denoiser.terms.num_inference_steps, denoiser.terms.guidance_scale) == (50, 30.0)
    for fields, param in (({}, "image"), ({"image": PICTURE}, "mask_image")):
        with pytest.raises(InvalidRequest, match="needs an image and a mask_image") as error:
            begin_as_asked(denoiser, [1], **SMALL, **fields)
        assert error.value.param == param
    with pytest.raises(UnsupportedModel, match="a transformer of 288 channels; .* there are those of 16"):
        Denoiser(FluxPipeline.from_pipe(tiny_flux_fill()))
    with pytest.raises(UnsupportedModel, match="a transformer of 16 channels; .* there are those of 288"):
        Denoiser(FluxFillPipeline.from_pipe(tiny_flux()))


def test_what_the_system_says_is_the_users_own() -> None:
    pipeline = tiny_flux2()
    before = finish(Denoiser(pipeline), begin(Denoiser(pipeline), [1], **SMALL))
    pipeline.tokenizer.chat_template = "{{ messages[0].content[0].text }}{{ messages[1].content[0].text }}"
    pipeline.system_message = "See."
    denoiser = Denoiser(pipeline)
    said = finish(denoiser, begin(denoiser, [1], **SMALL))
    assert not torch.equal(said, before)
    assert torch.equal(said, plain(pipeline, [1], num_inference_steps=3, **SIZE))


@pytest.mark.parametrize("call", [{}, {"negative_prompt": "fog"}, {"guidance_scale": 1.0}])
def test_guidance_of_chroma_is_the_pipelines(call: dict[str, Any]) -> None:
    check_numbers(tiny_chroma(), **call)
