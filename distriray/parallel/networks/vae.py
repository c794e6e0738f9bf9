"""The decoder of Stable Diffusion's VAE: that of `AutoencoderKL`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder
from torch import nn

from distriray.parallel.context import PatchContext
from distriray.parallel.layers.attention import PatchSpatialAttention
from distriray.parallel.networks.spatial import (
    SELF_ATTENTION,
    convert_conv_or_norm,
    has_own_forward,
    is_foreign,
    spare_messages,
)
from distriray.parallel.partition import Partition


def decoder_of(pipeline: Any) -> Decoder | None:
    """The decoder of the pipeline's VAE, if it can be cut into patches: that of Stable Diffusion can."""
    vae = getattr(pipeline, "vae", None)
    if not isinstance(vae, AutoencoderKL) or type(vae.decoder) is not Decoder or not can_be_cut(vae.decoder):
        return None
    return vae.decoder


def can_be_cut(decoder: Decoder) -> bool:
    """Whether all layers of a VAE's decoder are now of the kinds that are known to be cut into patches."""
    if {type(block).__name__ for block in decoder.up_blocks} != {"UpDecoderBlock2D"}:
        return False
    for module in decoder.modules():
        if is_foreign(module) or has_own_forward(module):
            return False
        if isinstance(module, nn.Conv2d):
            if module.stride != (1, 1):
                return False
        elif isinstance(module, Attention):
            if type(module.processor) not in SELF_ATTENTION or module.spatial_norm:
                return False
        elif type(module).__name__ == "SpatialNorm":
            return False
    return True


def convert_decoder(decoder: Decoder, context: PatchContext) -> None:
    """Convert every layer of a decoder that `can_be_cut` and is not yet patch-parallel."""
    for module in decoder.modules():
        if isinstance(module, Attention):
            if getattr(module.processor, "context", None) is not context:
                module.processor = PatchSpatialAttention(context)
        else:
            convert_conv_or_norm(module, context)
    spare_messages(decoder)


def picture_partition(decoder: Decoder, latents: torch.Tensor, patches: int) -> Partition:
    """Who of `patches` ranks owns which rows of the picture (level 0) and of the latents (the last level).

    Args:
        latents: (batch, channels, rows, columns).

    Raises:
        InvalidRequest: fewer rows of latents than ranks.
    """
    levels = len(decoder.up_blocks) - 1
    height, width = (side << levels for side in latents.shape[2:])
    return Partition(height, width, levels, patches)
