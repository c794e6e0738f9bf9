"""Prompts: which encoder reads which, what is said of those that are cut, and what else SDXL is told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from distriray.denoise import Denoiser
from distriray.requests import SamplingParams
from tests.models import (
    tiny_chroma,
    tiny_flux,
    tiny_flux_schnell,
    tiny_hunyuan_image,
    tiny_krea2,
    tiny_longcat_image,
    tiny_ovis_image,
    tiny_sd3,
    tiny_sdxl,
    tiny_z_image,
)
from tests.unit.flow_matching.families import SMALL, begin
from tests.unit.flow_matching.ordinary import plain
from tests.unit.test_denoise import SIZE, finish

SECOND = {"prompt_2": "a hill", "negative_prompt_2": "fog"}
THIRD = {"prompt_3": "an island", "negative_prompt_3": "a boat"}
TEXTS: dict[str, tuple[Callable[[], Any], dict[str, str]]] = {
    "sdxl": (tiny_sdxl, SECOND),
    "sdxl, both negative": (tiny_sdxl, {"negative_prompt": "rain", **SECOND}),
    "sd3": (tiny_sd3, SECOND),
    "sd3 with T5": (partial(tiny_sd3, t5=True), {**SECOND, **THIRD}),
    "flux": (tiny_flux, {"prompt_2": "a hill"}),
}


@pytest.mark.parametrize("model", TEXTS)
def test_encoders_with_prompts_of_their_own_read_them_as_the_pipelines_do(model: str) -> None:
    """But for SDXL's second negative prompt, which diffusers forgets where there is no first."""
    make, texts = TEXTS[model]
    pipeline = make()
    call = {**SMALL, "guidance_scale": 4.0}
    call.pop("prompt")
    first = {"negative_prompt": ""} if "negative_prompt_2" in texts else {}
    expected = plain(pipeline, [1], **call, **{**first, **texts})
    denoiser = Denoiser(pipeline)
    state = begin(denoiser, [1], prompt="a lake", **call, **texts)
    assert state.warnings == ()
    torch.testing.assert_close(finish(denoiser, state), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", ["sd3", "flux", "sdxl"])
def test_each_text_that_is_cut_is_named_and_none_that_another_encoder_reads_whole(model: str) -> None:
    make, _ = TEXTS[model]
    denoiser = Denoiser(make())
    long = "x" * 90  # a token a letter
    params = {**SMALL, "seed": 1, "prompt": "a lake"}

    def said(**texts: str) -> list[str]:
        state = denoiser.prepare(SamplingParams(**{**params, **texts}))
        return [warning.split(" tokens, and")[0] for warning in state.warnings]

    by_t5 = model == "flux"  # which takes more than CLIP
    assert said(prompt=long) == ([] if by_t5 else ["prompt has 90"])
    assert said(prompt=long, prompt_2="a hill") == ["prompt has 90"]
    assert said(prompt_2=long) == ([] if by_t5 else ["prompt_2 has 90"])


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (tiny_sd3, 75),
        (partial(tiny_sd3, t5=True), 254),
        (tiny_flux, 510),
        (tiny_flux_schnell, 254),
        (tiny_chroma, 510),
        (tiny_z_image, 464),  # 48 letters of a template are around it
        (tiny_hunyuan_image, 854),  # 180 of one are before it
        (tiny_longcat_image, 512),
        (tiny_ovis_image, 102),  # 182 around, of 284
        (tiny_krea2, 361),  # 180 before, of 541
    ],
)
def test_a_prompt_is_said_to_be_cut_where_no_encoder_takes_all_of_it(
    make: Callable[[], Any], most: int
) -> None:
    """With a tokenizer of a token a letter and two special ones, also in T5's place."""
    denoiser = Denoiser(make())

    def warnings(letters: int) -> tuple[str, ...]:
        params = SamplingParams(prompt="x" * letters, seed=1, num_inference_steps=1, **SIZE)
        return denoiser.prepare(params).warnings

    assert warnings(most) == ()
    (said,) = warnings(most + 9)
    assert said.startswith(f"prompt has {most + 9} tokens, and a text encoder takes {most}:")


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_what_sdxl_is_told_of_the_photograph_is_the_pipelines(scale: float) -> None:
    pipeline = tiny_sdxl()
    call = {**SMALL, "guidance_scale": scale}
    call.pop("prompt")
    told = {"original_size": "640x480", "target_size": "320x200", "crops_coords_top_left": "300,20"}
    theirs = {"original_size": (480, 640), "target_size": (200, 320), "crops_coords_top_left": (20, 300)}
    expected = plain(pipeline, [1], **call, **theirs)
    denoiser = Denoiser(pipeline)
    state = begin(denoiser, [1], prompt="a lake", **call, **told)
    torch.testing.assert_close(finish(denoiser, state), expected, rtol=1e-4, atol=1e-4)
