"""A picture is decoded alone and together, and is the same."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bench import decoding
from distriray.collective import run_in_lockstep
from tests.models import tiny_hunyuan_image_vae, tiny_qwen_vae, tiny_vae

VAES = {
    "plain": tiny_vae,
    "of frames": tiny_qwen_vae,
    "of more pixels": tiny_hunyuan_image_vae,
}


@pytest.mark.parametrize("name", VAES)
def test_a_picture_is_decoded_both_ways_in_every_round(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(decoding, "VAES", VAES)
    first, second = run_in_lockstep(2, partial(decoding.measure, name=name, size=64, rounds=2))
    assert len(first.alone_s) == len(first.together_s) == 2 and min(first.alone_s + first.together_s) > 0
    assert first.apart < 1e-4 and second.alone_s == []


@pytest.mark.parametrize("name", decoding.VAES)
def test_latents_are_those_of_the_size_that_is_asked_for(name: str) -> None:
    with torch.device("meta"):
        vae = decoding.VAES[name]()
        picture = vae.decode(decoding._latents(vae, 256).to("meta"), return_dict=False)[0]
    assert picture.shape[-2:] == (256, 256)
