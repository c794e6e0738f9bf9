"""Networks of published models, with the shapes of one step of an image: the weights are anybody's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, UNet2DConditionModel

from bench.exchange import unet_inputs

SDXL: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""The U-Net of stabilityai/stable-diffusion-xl-base-1.0."""


@dataclass(frozen=True)
class Published:
    """A network as it was published.

    Attributes:
        name: of the model.
        make: the network, with nothing in its weights; made on whatever device is the default.
        inputs: what a step of a square picture calls it with, by pixels of a side, on the CPU in float32;
            without the timestep.
        timestep: of such a step.
        dtype: that it is used in.
        splits: whether halves of a gang may take halves of its batch.
    """

    name: str
    make: Callable[[], torch.nn.Module]
    inputs: Callable[[Any, int], dict[str, Any]]
    timestep: Callable[[float], torch.Tensor | float]
    dtype: torch.dtype
    splits: bool


def _as_batch(timestep: float) -> torch.Tensor:
    return torch.tensor([timestep / 1000])


def _flux_inputs(network: Any, size: int) -> dict[str, Any]:
    """512 tokens of T5's, as the pipeline gives them unless told otherwise."""
    return {
        "hidden_states": torch.randn(1, (size // 16) ** 2, network.config.in_channels),
        "encoder_hidden_states": torch.randn(1, 512, network.config.joint_attention_dim),
        "pooled_projections": torch.randn(1, network.config.pooled_projection_dim),
        "guidance": torch.full((1,), 3.5),
        "img_ids": torch.zeros((size // 16) ** 2, 3),
        "txt_ids": torch.zeros(512, 3),
    }


def _qwen_image_inputs(network: Any, size: int) -> dict[str, Any]:
    """One of the two calls of a guided step, with a text of 128 tokens."""
    return {
        "hidden_states": torch.randn(1, (size // 16) ** 2, network.config.in_channels),
        "encoder_hidden_states": torch.randn(1, 128, network.config.joint_attention_dim),
        "img_shapes": [[(1, size // 16, size // 16)]],
    }


PUBLISHED = {
    "sdxl": Published(
        "a guided step of SDXL",
        lambda: UNet2DConditionModel(**SDXL),
        unet_inputs,
        float,
        torch.float16,
        splits=True,
    ),
    "flux": Published(
        "a step of FLUX.1-dev",
        lambda: FluxTransformer2DModel(guidance_embeds=True),
        _flux_inputs,
        _as_batch,
        torch.bfloat16,
        splits=False,
    ),
    "qwen-image": Published(
        "a call of Qwen-Image, of two a step",
        lambda: QwenImageTransformer2DModel(),
        _qwen_image_inputs,
        _as_batch,
        torch.bfloat16,
        splits=False,
    ),
}
