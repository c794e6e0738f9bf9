"""Networks of published models, with the shapes of one step of an image: the weights are anybody's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import (
    Flux3Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from torch.utils import _pytree as pytree

from bench.exchange import unet_inputs
from distriray.denoise.pipelines.flow import BRANCHES
from distriray.parallel import engine_of

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

SMALL: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 8,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}
"""FLUX.1's and Qwen-Image's, in a size for dry runs."""


@dataclass(frozen=True)
class Published:
    """A network as it was published.

    Attributes:
        name: of the model.
        make: the network, with weights of no meaning; made on whatever device is the default.
        small: the same layout in a size for dry runs.
        inputs: what a step of a square picture calls it with, by pixels of a side, on the CPU in float32;
            without the timestep.
        timestep: of such a step.
        dtype: that it is used in.
        splits: whether halves of a gang may take halves of its batch, or a branch each.
        heads: of attention, each number that layers have.
        spatial: whether it is over feature maps, with group norms and convolutions.
        clock: what the network calls its timestep.
        branches: of guidance that have a call of their own in a step.
    """

    name: str
    make: Callable[[], torch.nn.Module]
    small: Callable[[], torch.nn.Module]
    inputs: Callable[[Any, int], dict[str, Any]]
    timestep: Callable[[float], torch.Tensor | float]
    dtype: torch.dtype
    splits: bool
    heads: tuple[int, ...]
    spatial: bool = False
    clock: str = "timestep"
    branches: tuple[str, ...] = ()

    def inputs_of(self, network: Any, size: int) -> dict[str, Any]:
        """`inputs` where `network` computes, and in its dtype."""
        return placed(self.inputs(network, size), network)

    def timestep_on(self, device: torch.device | str, timestep: float) -> torch.Tensor:
        """`timestep` as a tensor there, so that a call copies none."""
        return torch.as_tensor(self.timestep(timestep), device=device)

    def call(self, network: Any, timestep: torch.Tensor | float, inputs: dict[str, Any]) -> None:
        """A step: its call, or those of its branches."""
        given = {self.clock: timestep, **inputs}
        if self.branches and engine_of(network) is not None:
            network(branches=dict.fromkeys(self.branches, given))
            return
        for _ in self.branches or ("",):
            network(**given)


def random_network(
    make: Callable[[], torch.nn.Module], device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Any:
    """A network with seeded random weights, made on the device itself."""
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            network = make()
    finally:
        torch.set_default_dtype(default)
    return network.to(dtype).eval().requires_grad_(False)


def placed(inputs: dict[str, Any], network: Any) -> dict[str, Any]:
    """Tensors where `network` computes, and in its dtype."""

    def place(leaf: Any) -> Any:
        return leaf.to(network.device, network.dtype) if isinstance(leaf, torch.Tensor) else leaf

    return dict(pytree.tree_map(place, inputs))


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


def _flux3_inputs(network: Any, size: int, edited: int = 0) -> dict[str, Any]:
    """Each call of a guided step, with a text of 80 tokens, the least that the pipeline gives.

    Args:
        edited: how many pictures of that size the model is shown.
    """
    image, text = (size // 16) ** 2, 80
    inputs = {
        "hidden_states": torch.randn(1, image, network.config.in_channels),
        "encoder_hidden_states": torch.randn(1, text, network.config.joint_attention_dim),
        "img_ids": torch.zeros(image, 4),
        "txt_ids": torch.zeros(text, 4),
    }
    if edited:
        inputs["image_cond_hidden_states"] = torch.randn(1, edited * image, network.config.cond_in_channels)
        inputs["image_cond_ids"] = torch.zeros(edited * image, 4)
    return inputs


def _qwen_image_inputs(network: Any, size: int, text: int = 128, edited: int = 0) -> dict[str, Any]:
    """Each call of a guided step.

    Args:
        text: its tokens; with those of a picture that the language model is shown, 196 more.
        edited: how many pictures of the same size the network is shown.
    """
    rows, pictures = size // 16, 1 + edited
    return {
        "hidden_states": torch.randn(1, pictures * rows**2, network.config.in_channels),
        "encoder_hidden_states": torch.randn(1, text, network.config.joint_attention_dim),
        "img_shapes": [[(1, rows, rows)] * pictures],
    }


def _z_image_inputs(network: Any, size: int) -> dict[str, Any]:
    """One picture, as without guidance, with a text of 128 tokens."""
    return {
        "x": [torch.randn(network.config.in_channels, 1, size // 8, size // 8)],
        "cap_feats": [torch.randn(128, network.config.cap_feat_dim)],
    }


FLUX3 = Published(
    "a guided step of FLUX.3, of two calls",
    Flux3Transformer2DModel,
    lambda: Flux3Transformer2DModel(
        in_channels=16,
        cond_in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=8,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 4, 4),
    ),
    _flux3_inputs,
    _as_batch,
    torch.bfloat16,
    splits=True,
    heads=(24,),
    branches=tuple(BRANCHES),
)

QWEN_IMAGE = Published(
    "a guided step of Qwen-Image, of two calls",
    lambda: QwenImageTransformer2DModel(),
    lambda: QwenImageTransformer2DModel(**SMALL, out_channels=4),
    _qwen_image_inputs,
    _as_batch,
    torch.bfloat16,
    splits=True,
    heads=(24,),
    branches=tuple(BRANCHES),
)

PUBLISHED = {
    "sdxl": Published(
        "a guided step of SDXL",
        lambda: UNet2DConditionModel(**SDXL),
        lambda: UNet2DConditionModel(
            **SDXL
            | {
                "block_out_channels": (32, 32, 32),
                "attention_head_dim": (1, 1, 1),
                "cross_attention_dim": 32,
                "transformer_layers_per_block": (1, 1, 1),
            }
        ),
        unet_inputs,
        float,
        torch.float16,
        splits=True,
        heads=(10, 20),
        spatial=True,
    ),
    "flux": Published(
        "a step of FLUX.1-dev",
        lambda: FluxTransformer2DModel(guidance_embeds=True),
        lambda: FluxTransformer2DModel(
            **SMALL, guidance_embeds=True, num_single_layers=2, pooled_projection_dim=32
        ),
        _flux_inputs,
        _as_batch,
        torch.bfloat16,
        splits=False,
        heads=(24,),
    ),
    "flux3": FLUX3,
    "flux3-edit": replace(
        FLUX3,
        name="a guided step of FLUX.3, of two calls, that is shown a picture to edit",
        inputs=partial(_flux3_inputs, edited=1),
    ),
    "qwen-image": QWEN_IMAGE,
    "qwen-image-edit": replace(
        QWEN_IMAGE,
        name="a guided step of Qwen-Image-Edit 2511, of two calls, that is shown a picture to edit",
        make=lambda: QwenImageTransformer2DModel(zero_cond_t=True),
        small=lambda: QwenImageTransformer2DModel(**SMALL, out_channels=4, zero_cond_t=True),
        inputs=partial(_qwen_image_inputs, text=124 + 196, edited=1),
    ),
    "z-image": Published(
        "a step of Z-Image-Turbo",
        lambda: ZImageTransformer2DModel(),
        lambda: ZImageTransformer2DModel(
            dim=128,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=8,
            n_kv_heads=8,
            cap_feat_dim=32,
            axes_dims=[4, 6, 6],
        ),
        _z_image_inputs,
        _as_batch,
        torch.bfloat16,
        splits=False,
        heads=(30,),
        clock="t",
    ),
}
