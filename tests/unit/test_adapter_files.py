"""Files of other trainers: each layer counts as its file says, and nothing is left out without a word."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import save_file
from torch import Tensor

from distriray.errors import UnusableAdapter
from tests.adapters import Weights, random_weights
from tests.models import SHALLOW, tiny_flux, tiny_flux2, tiny_sd15, tiny_sdxl, tiny_z_image
from tests.unit.test_adapters import denoiser_of, draw

KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
"""What the names of a part's layers begin with in files of kohya's trainers."""


def of_ranks(pipeline: Any, layers: Sequence[str]) -> Weights:
    """Weights of ranks 1 to 3, by turns."""
    whole = random_weights(pipeline, 1, layers=layers, text=("q_proj", "out_proj", "fc1"), rank=3)
    cut: Weights = {}
    for index, (name, weight) in enumerate(whole.items()):
        rank = 1 + index // 2 % 3
        cut[name] = weight[:rank].clone() if "lora_A" in name else weight[:, :rank].clone()
    return cut


def kohya(weights: Weights, alpha: Callable[[int], float]) -> Weights:
    """The same weights as kohya's trainers write them, with an alpha for each rank."""
    written: Weights = {}
    for name, weight in weights.items():
        part, _, place = name.removesuffix(".weight").partition(".")
        layer, _, factor = place.rpartition(".")
        model = "text_model." if part.startswith("text_encoder") else ""
        stem = f"{KOHYA[part]}_{(model + layer.removeprefix(model)).replace('.', '_')}"
        written[f"{stem}.{'lora_down' if factor == 'lora_A' else 'lora_up'}.weight"] = weight
        if factor == "lora_A":
            written[f"{stem}.alpha"] = torch.tensor(alpha(len(weight)))
    return written


@pytest.mark.parametrize("make", [tiny_sd15, lambda: tiny_sdxl(**SHALLOW)])
def test_each_layer_has_the_alpha_that_its_file_says(make: Callable[[], Any], tmp_path: Path) -> None:
    """Of ranks that differ, as a file has them that was cut to what counts in each layer."""
    pipeline = make()
    weights = of_ranks(pipeline, ("to_q", "to_out.0", "conv1", "ff.net.2"))
    save_file(weights, tmp_path / "bare.safetensors")
    save_file(kohya(weights, lambda rank: rank / 2), tmp_path / "half.safetensors")
    save_file(kohya(weights, lambda rank: 1), tmp_path / "one.safetensors")  # a whole number
    over_rank = {
        name: weight / weight.shape[1] if "lora_B" in name else weight for name, weight in weights.items()
    }
    save_file(over_rank, tmp_path / "over-rank.safetensors")
    about = {LORA_ADAPTER_METADATA_KEY: json.dumps({f"{part}.lora_alpha": 100 for part in KOHYA})}
    save_file(kohya(weights, lambda rank: rank / 2), tmp_path / "told.safetensors", metadata=about)
    denoiser = denoiser_of(pipeline, tmp_path)
    half = draw(denoiser, ("half", 1.0))
    assert torch.equal(half, draw(denoiser, ("bare", 0.5)))
    assert torch.equal(half, draw(denoiser, ("told", 1.0))), "alphas go before what is said of them"
    expected = draw(denoiser, ("over-rank", 1.0))
    torch.testing.assert_close(draw(denoiser, ("one", 1.0)), expected, rtol=1e-4, atol=1e-4)


def test_alphas_of_text_encoders_beside_diffusers_names_count_too(tmp_path: Path) -> None:
    pipeline = tiny_flux()
    weights = of_ranks(pipeline, ("to_q",))
    save_file(weights, tmp_path / "bare.safetensors")
    alphas: Weights = {}
    for name in list(weights):
        part, _, rest = name.partition(".")
        weights[f"{part}.{'text_model.' if part == 'text_encoder' else ''}{rest}"] = weights.pop(name)
    for name, weight in weights.items():
        if name.endswith(".lora_A.weight"):
            alphas[f"{name.removesuffix('.lora_A.weight')}.alpha"] = torch.tensor(len(weight) / 2)
    save_file({**weights, **alphas}, tmp_path / "half.safetensors")
    denoiser = denoiser_of(pipeline, tmp_path)
    assert torch.equal(draw(denoiser, ("half", 1.0)), draw(denoiser, ("bare", 0.5)))


def pair(stem: str, out: int, into: int, alpha: float | None = None, by: float = 0.3) -> Weights:
    """A layer's factors of rank 2 by kohya's names, that which comes last times `by`."""
    generator = torch.Generator().manual_seed(len(stem))
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, into), (out, 2)))
    scaled: dict[str, Tensor] = {} if alpha is None else {f"{stem}.alpha": torch.tensor(alpha)}
    return {f"{stem}.lora_down.weight": 0.3 * down, f"{stem}.lora_up.weight": by * up, **scaled}


PROJECTION = "lora_unet_double_blocks_0_img_attn_proj"
OF_FLUX = pair(PROJECTION, 32, 32, alpha=1.0)
"""A file that fits FLUX.1, and FLUX.2."""
T5 = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
OF_XL = pair("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", 32, 32)
LEFT_OUT: dict[str, tuple[Callable[[], Any], Weights, str]] = {
    "blocks by other names": (
        lambda: tiny_sdxl(**SHALLOW),
        pair("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k", 32, 32),
        "input_blocks_4_1_transformer_blocks_0_attn1_to_k.lora_down.weight is nothing that diffusers loads",
    ),
    "T5": (tiny_flux, pair(T5, 16, 16), f"{T5}.lora_down.weight is nothing that diffusers loads for a Flux"),
    "a bias": (tiny_flux, {f"{PROJECTION}.diff_b": torch.ones(32)}, "proj.diff_b is nothing that diffusers"),
    "modulation of FLUX.2": (
        tiny_flux2,
        pair("lora_unet_single_stream_modulation_lin", 96, 32),
        "single_stream_modulation_lin.lora_down.weight is nothing that diffusers loads for a Flux2Pipeline",
    ),
    "LoHa": (
        tiny_flux2,
        {f"{PROJECTION}.hada_w1_a": torch.ones(32, 2)},
        "hada_w1_a is of a LoHa, which is n",
    ),
    "LoKr": (
        tiny_flux2,
        {f"{PROJECTION}.lokr_w1": torch.ones(2, 2)},
        "lokr_w1 is of a LoKr, which is not re",
    ),
    "a layer that is not there": (
        tiny_flux,
        pair("lora_unet_triple_blocks_0_img_mlp_0", 32, 32),
        "Incompatible keys detected: lora_unet_triple_blocks_0_img_mlp_0.lora_down",
    ),
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_what_diffusers_would_leave_out_is_refused_by_name(what: str, tmp_path: Path) -> None:
    make, more, says = LEFT_OUT[what]
    pipeline = make()
    fits = OF_XL if "unet" in pipeline.components else OF_FLUX
    save_file(fits, tmp_path / "whole.safetensors")
    save_file({**fits, **more}, tmp_path / "more.safetensors")
    denoiser = denoiser_of(pipeline, tmp_path)
    denoiser.adapters.check(denoiser.adapters.known["whole"])
    with pytest.raises(UnusableAdapter, match=f"^adapter 'more' does not fit the model: .*{says}"):
        draw(denoiser, ("more", 1.0))


def test_a_text_encoder_that_diffusers_leaves_out_beside_kohyas_names_is_refused(tmp_path: Path) -> None:
    weights = random_weights(tiny_flux(), 1, layers=["to_q"], text=True)
    kohyas = {
        name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): weight
        for name, weight in weights.items()
    }
    save_file(kohyas, tmp_path / "ink.safetensors")
    with pytest.raises(UnusableAdapter, match=r"text_encoder\..* is nothing that diffusers loads"):
        draw(denoiser_of(tiny_flux(), tmp_path), ("ink", 1.0))


@pytest.mark.parametrize(
    "more",
    [
        pair(T5, 16, 16, alpha=1.0, by=0.0),
        {f"{PROJECTION}.diff_b": torch.zeros(32)},
    ],
)
def test_what_changes_nothing_may_be_left_out(more: Weights, tmp_path: Path) -> None:
    save_file(OF_FLUX, tmp_path / "plain.safetensors")
    save_file({**OF_FLUX, **more}, tmp_path / "more.safetensors")
    denoiser = denoiser_of(tiny_flux(), tmp_path)
    assert torch.equal(draw(denoiser, ("more", 1.0)), draw(denoiser, ("plain", 1.0)))


def test_layers_that_a_file_has_whole_and_in_parts_count_once(tmp_path: Path) -> None:
    layer = "lora_unet_layers_0_attention"
    parts = {**pair(f"{layer}_to_q", 32, 32), **pair(f"{layer}_to_out_0", 32, 32, alpha=1.0)}
    whole = {**pair(f"{layer}_qkv", 96, 32, alpha=1.0), **pair(f"{layer}_out", 32, 32)}
    dotted = {
        name.replace("lora_down", "lora.down").replace("lora_up", "lora.up"): weight
        for name, weight in {**parts, **whole}.items()
    }
    save_file(parts, tmp_path / "once.safetensors")
    save_file(dotted, tmp_path / "twice.safetensors")
    denoiser = denoiser_of(tiny_z_image(), tmp_path)
    assert torch.equal(draw(denoiser, ("twice", 1.0)), draw(denoiser, ("once", 1.0)))
