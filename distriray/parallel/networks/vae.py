"""The decoder of Stable Diffusion's VAE, which those of FLUX have too."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D
from torch import nn

from distriray.parallel.context import PatchContext
from distriray.parallel.layers.attention import PatchSpatialAttention, has_own_scale
from distriray.parallel.networks.local import LocalCode, replaced_call
from distriray.parallel.networks.spatial import (
    SELF_ATTENTION,
    convert_conv_or_norm,
    has_own_forward,
    is_foreign,
    spare_messages,
)
from distriray.parallel.partition import Partition


def decoder_of(pipeline: Any, local: LocalCode) -> Decoder | None:
    """The decoder of the pipeline's VAE, if it can be cut into patches."""
    vae = getattr(pipeline, "vae", None)
    if not isinstance(vae, AutoencoderKL | AutoencoderKLFlux2) or type(vae.decoder) is not Decoder:
        return None
    return vae.decoder if can_be_cut(vae.decoder, local) else None


def can_be_cut(decoder: Decoder, local: LocalCode | None = None, forward: Any = None) -> bool:
    """Whether all layers of a VAE's decoder are now of the kinds that are known to be cut into patches.

    Args:
        local: the code in it that works on some rows without the others.
        forward: what computes a rank's part; None is the decoder's class's.
    """
    local = local or LocalCode()
    if {type(block) for block in decoder.up_blocks if not local.says(block)} - {UpDecoderBlock2D}:
        return False
    if local.obstacle_around("the decoder", decoder, forward) is not None:
        return False
    if replaced_call((AttnProcessor, AttnProcessor2_0)) is not None:
        return False
    for name, module in decoder.named_modules():
        if module is decoder:
            continue  # its hooks see the whole picture
        if is_foreign(module) or has_own_forward(module) or local.obstacle(name, module) is not None:
            return False
        if isinstance(module, nn.Conv2d):
            if module.stride != (1, 1):
                return False
        elif isinstance(module, Attention):
            if type(module.processor) not in SELF_ATTENTION or module.spatial_norm:
                return False
            if not has_own_scale(module):
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
    """Partition of the picture (level 0) and of the latents (the last level) among `patches` ranks.

    Args:
        latents: (batch, channels, rows, columns).

    Raises:
        InvalidRequest: fewer rows of latents than ranks.
    """
    levels = len(decoder.up_blocks) - 1
    height, width = (side << levels for side in latents.shape[2:])
    return Partition(height, width, levels, patches)
