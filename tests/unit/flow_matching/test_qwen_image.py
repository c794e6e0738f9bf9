"""Qwen-Image and the one that edits: what is theirs alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distriray.denoise import Denoiser
from distriray.errors import InvalidRequest, UnsupportedModel
from tests.models import tiny_qwen_image, tiny_qwen_image_edit_plus
from tests.unit.flow_matching.families import SMALL, begin
from tests.unit.flow_matching.ordinary import check_numbers


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.0, "negative_prompt": "fog"},
        {"guidance_scale": 3.0, "negative_prompt": ""},  # against nothing, and not against what is unsaid
        {"guidance_scale": 3.0, "negative_prompt": "fog over all of the lake, " * 30},  # more than it reads
    ],
)
def test_guidance_of_qwen_image_is_the_pipelines(call: dict[str, Any]) -> None:
    """Whatever the lengths of the texts."""
    check_numbers(tiny_qwen_image(), **call)


def test_qwen_image_that_takes_guidance_as_an_input_is_refused() -> None:
    pipeline = tiny_qwen_image()
    pipeline.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(UnsupportedModel, match="QwenImageTransformer2DModel with guidance_embeds"):
        Denoiser(pipeline)


def test_what_qwen_image_does_not_read_of_a_prompt_is_said() -> None:
    """It reads 512 tokens, here of a byte each; what comes behind them changes nothing."""
    denoiser = Denoiser(tiny_qwen_image())
    longer, other = (
        begin(denoiser, [1], **{**SMALL, "prompt": "a" * 512 + end, "negative_prompt": "fog"})
        for end in ("bcd", "xyz")
    )
    assert longer.warnings == ("prompt has 515 tokens, and a text encoder takes 512: the rest is not used",)
    assert torch.equal(longer.values["prompt_embeds"], other.values["prompt_embeds"])
    assert not begin(denoiser, [1], **{**SMALL, "prompt": "a" * 512}).warnings


def test_qwen_image_edit_refuses_what_it_has_no_positions_for() -> None:
    pipeline = tiny_qwen_image_edit_plus()
    pipeline.transformer.pos_embed.pos_freqs = pipeline.transformer.pos_embed.pos_freqs[:700]
    denoiser = Denoiser(pipeline)
    begin(denoiser, [1], **SMALL)
    for field in ("prompt", "negative_prompt"):
        says = rf"{field} and pictures come to \d+ tokens, and this model has positions for 69\d; make it"
        with pytest.raises(InvalidRequest, match=says) as refused:
            begin(denoiser, [1], **{**SMALL, field: "a lake" * 100})
        assert refused.value.param == field
