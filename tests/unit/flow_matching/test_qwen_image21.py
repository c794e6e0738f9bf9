"""Qwen-Image 2.1 step by step: guidance, kept keys and values, fixed steps, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any
from weakref import WeakSet

import pytest
import torch
from diffusers import QwenImage21Transformer2DModel
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from PIL import Image

from distriray.denoise import Denoiser, DenoiseState
from distriray.denoise.pipelines.families import qwen_image21
from distriray.errors import InvalidRequest, UnsupportedModel
from distriray.picture import opaque, png
from tests.models import tiny_qwen_image21
from tests.unit.flow_matching.families import SMALL
from tests.unit.flow_matching.ordinary import check_numbers, plain
from tests.unit.test_denoise import PICTURE, SIZE, begin, finish

GUIDED = {"guidance_scale": 3.0}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str | None]]:
    """How often the network was called, by what became of the keys and values of the text."""
    counted: Counter[str | None] = Counter()
    forward = QwenImage21Transformer2DModel.forward

    def count(network: Any, *args: Any, kv_cache_mode: str | None = None, **kwargs: Any) -> Any:
        counted[kv_cache_mode] += 1
        return forward(network, *args, kv_cache_mode=kv_cache_mode, **kwargs)

    monkeypatch.setattr(QwenImage21Transformer2DModel, "forward", count)
    return counted


@pytest.mark.parametrize(
    "call",
    [
        {},
        GUIDED,
        {**GUIDED, "negative_prompt": "fog"},
        {**GUIDED, "negative_prompt": "fog over all of the lake, " * 30},
    ],
)
def test_guidance_is_the_pipelines_whatever_the_lengths_of_the_texts(
    call: dict[str, Any],
) -> None:
    check_numbers(tiny_qwen_image21(), **call)


def test_keys_and_values_of_a_text_are_made_once_for_a_branch_and_again_where_it_goes_on(
    calls: Counter[str | None],
) -> None:
    denoiser = Denoiser(tiny_qwen_image21())
    state = begin(denoiser, [1], **SMALL, **GUIDED)
    expected = finish(denoiser, state)
    assert calls == {"extract": 2, "cached": 6}
    carried = begin(denoiser, [1], **SMALL, **GUIDED)
    denoiser.step(carried)
    carried, denoiser = DenoiseState.from_bytes(carried.to_bytes()), Denoiser(tiny_qwen_image21())
    assert torch.equal(finish(denoiser, carried), expected)
    assert calls == {"extract": 6, "cached": 12}


def test_states_in_turn_keep_their_own(calls: Counter[str | None]) -> None:
    denoiser = Denoiser(tiny_qwen_image21())
    prompts = "a lake", "a hill"  # of as many tokens

    def state(prompt: str) -> DenoiseState:
        return begin(denoiser, [1], **{**SMALL, "prompt": prompt})

    alone = [finish(denoiser, state(prompt)) for prompt in prompts]
    assert not torch.equal(*alone)
    one, other = map(state, prompts)
    while not other.done:
        denoiser.step(one)
        denoiser.step(other)
    assert torch.equal(one.latents, alone[0]) and torch.equal(other.latents, alone[1])
    assert calls == {"extract": 2 + 6, "cached": 12}


def test_nothing_is_kept_when_an_image_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: WeakSet[QwenImage21KVCache] = WeakSet()

    def make(layers: int) -> QwenImage21KVCache:
        cache = QwenImage21KVCache(layers)
        kept.add(cache)
        return cache

    monkeypatch.setattr(qwen_image21, "QwenImage21KVCache", make)
    denoiser = Denoiser(tiny_qwen_image21())
    state = begin(denoiser, [1], **SMALL, **GUIDED)
    counts = []
    while not state.done:
        denoiser.step(state)
        counts.append(len(kept))
    assert counts == [2, 2, 0]


def test_a_prefix_that_goes_by_the_timestep_is_not_kept(calls: Counter[str | None]) -> None:
    pipeline = tiny_qwen_image21()
    pipeline.transformer.register_to_config(causal_condition=False)
    denoiser = Denoiser(pipeline)
    drawn = finish(denoiser, begin(denoiser, [1], **SMALL))
    assert calls == {None: 3}
    assert torch.equal(drawn, plain(pipeline, [1], num_inference_steps=3, **SIZE))


def test_steps_whose_noise_levels_a_model_says_are_its_own() -> None:
    pipeline = tiny_qwen_image21(sample_sigmas=[1.0, 0.7, 0.5, 0.1])
    denoiser = Denoiser(pipeline)
    call = {"prompt": "a lake", **SIZE}
    for steps in ({}, {"num_inference_steps": 4}):
        state = begin(denoiser, [1], **call, **steps)
        assert state.num_steps == 4
        assert torch.equal(finish(denoiser, state), plain(pipeline, [1], **SIZE))
    with pytest.raises(InvalidRequest, match="num_inference_steps 5: this model .* its 4 steps") as error:
        begin(denoiser, [1], **call, num_inference_steps=5)
    assert error.value.param == "num_inference_steps"
    usual = finish(
        Denoiser(tiny_qwen_image21()),
        begin(Denoiser(tiny_qwen_image21()), [1], **call, num_inference_steps=4),
    )
    assert not torch.allclose(usual, state.latents, atol=1e-2)


def test_what_is_transparent_in_a_picture_is_shown_so() -> None:
    """Its language model sees white there, as in the pipeline; its VAE sees the transparency."""
    pipeline = tiny_qwen_image21()
    denoiser = Denoiser(pipeline)
    clear = PICTURE.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    found, seen_white = (
        finish(denoiser, begin(denoiser, [3], **SMALL, image=each)) for each in (clear, opaque(clear))
    )
    assert torch.equal(found, plain(pipeline, [3], image=clear, num_inference_steps=3, **SIZE))
    assert not torch.allclose(found, seen_white, atol=1e-3)


def test_guidance_of_an_edit_is_the_pipelines() -> None:
    check_numbers(tiny_qwen_image21(), **GUIDED, negative_prompt="fog", image=PICTURE)


def test_pictures_have_transparency_as_files_too() -> None:
    denoiser = Denoiser(tiny_qwen_image21())
    state = begin(denoiser, [1], **SMALL)
    finish(denoiser, state)
    (picture,) = denoiser.decode(state)
    least, most = picture.getchannel("A").getextrema()
    assert picture.mode == "RGBA" and least < most
    assert png(picture)[25] == 6  # the kind of a PNG with transparency


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_texts_beyond_the_networks_positions_are_refused(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    denoiser = Denoiser(tiny_qwen_image21())
    ask = partial(begin, denoiser, [1], **{**SMALL, **GUIDED})
    most = ask().values["prompt_embeds"].shape[1]
    monkeypatch.setattr(qwen_image21, "TEXT_TOKENS", most)
    ask(negative_prompt="a lakes"[:6])
    with pytest.raises(InvalidRequest, match=f"^{field} comes to {most + 1} tokens, .* for {most}") as error:
        ask(**{field: "a lakes"})
    assert error.value.param == field


def test_models_that_the_pipeline_does_not_draw_with_are_refused() -> None:
    other, coarse = tiny_qwen_image21(), tiny_qwen_image21()
    other.vae.register_to_config(dim_mult=[1, 1, 1, 1])
    with pytest.raises(UnsupportedModel, match="AutoencoderKLQwenImage21 of 8 pixels .* takes 16"):
        Denoiser(other)
    coarse.transformer.register_to_config(patch_size=2)
    with pytest.raises(UnsupportedModel, match="patch_size 2"):
        Denoiser(coarse)
