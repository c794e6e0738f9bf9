"""Adapters with seeded random weights, as files that trainers write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("conv1", "conv2", "conv_in", "conv", "conv_shortcut")
TEXT = ("q_proj", "v_proj")

Weights = dict[str, Tensor]


def network_of(pipeline: Any) -> str:
    return "transformer" if "transformer" in pipeline.components else "unet"


def random_weights(
    pipeline: Any,
    seed: int,
    layers: Sequence[str] = ATTENTION + CONVOLUTIONS,
    text: bool | Sequence[str] = False,
    rank: int = 2,
) -> Weights:
    """Of an adapter on layers whose names end so, and of the text encoders too, or of layers of them."""
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    parts = {network_of(pipeline): layers}
    if text:
        ends = TEXT if text is True else text
        parts |= {part: ends for part in ("text_encoder", "text_encoder_2") if part in pipeline.components}
    for part, ends in parts.items():
        for name, layer in getattr(pipeline, part).named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and name.endswith(tuple(ends)):
                out, into, *kernel = layer.weight.shape
                shapes = {"lora_A": (rank, into, *kernel), "lora_B": (out, rank, *(1 for _ in kernel))}
                for factor, shape in shapes.items():
                    scale = 0.7 / (shape[1] * (kernel[0] if kernel else 1)) ** 0.5
                    weights[f"{part}.{name}.{factor}.weight"] = scale * torch.randn(
                        shape, generator=generator
                    )
    return weights


def write(
    path: Path, pipeline: Any, seed: int, change: Callable[[Weights], Any] = len, **options: Any
) -> Path:
    """A file of `random_weights`, with something about them changed."""
    weights = random_weights(pipeline, seed, **options)
    change(weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)
    return path
