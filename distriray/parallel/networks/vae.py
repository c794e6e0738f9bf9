"""The decoders of VAEs: which are known to be cut into patches, and their conversion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
)
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders import autoencoder_kl_hunyuanimage as hunyuan
from diffusers.models.autoencoders import autoencoder_kl_qwenimage as qwen
from diffusers.models.autoencoders import autoencoder_kl_qwenimage21 as qwen21
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D
from torch import nn

from distriray.parallel.context import PatchContext
from distriray.parallel.layers.attention import PatchSpatialAttention, has_own_scale
from distriray.parallel.layers.bare import has_class_forward
from distriray.parallel.layers.conv import PatchConv2d
from distriray.parallel.layers.group_norm import PatchGroupNorm
from distriray.parallel.layers.vae import (
    FORMS,
    PATCHED,
    PatchCausalConv2d,
    PatchCausalConv3d,
    PatchFrameAttention,
    PatchFrameAttention21,
    PatchMapAttention,
    keeps_size,
    patch_layer,
)
from distriray.parallel.networks.local import SPATIAL, TOKENWISE, LocalCode, replaced_call
from distriray.parallel.networks.spatial import (
    SELF_ATTENTION,
    convert_conv_or_norm,
    has_own_forward,
    is_foreign,
    spare_messages,
)
from distriray.parallel.partition import Partition


class DecoderKind(NamedTuple):
    """What is known of the decoders of one class.

    Attributes:
        doublings: how often one doubles rows and columns.
        layers: the exact classes of layers that look at one position at a time, or are converted.
    """

    doublings: Callable[[Any], int]
    layers: frozenset[type]


def _after_all_blocks_but_one(decoder: Any) -> int:
    return len(decoder.up_blocks) - 1


def _in_blocks_of_their_own(decoder: Any) -> int:
    return sum(type(block) is hunyuan.HunyuanImageUpsample for block in decoder.up_blocks)


_MAPS = TOKENWISE | {nn.Conv2d, PatchConv2d}
KINDS: dict[type[nn.Module], DecoderKind] = {
    Decoder: DecoderKind(_after_all_blocks_but_one, SPATIAL),
    qwen.QwenImageDecoder3d: DecoderKind(
        _after_all_blocks_but_one,
        _MAPS
        | {
            qwen.QwenImageCausalConv3d,
            PatchCausalConv3d,
            qwen.QwenImageAttentionBlock,
            PatchFrameAttention,
            qwen.QwenImageRMS_norm,
            qwen.QwenImageUpsample,
            qwen.QwenImageResample,
            qwen.QwenImageResidualBlock,
            qwen.QwenImageMidBlock,
            qwen.QwenImageUpBlock,
        },
    ),
    qwen21.QwenImage21Decoder3d: DecoderKind(
        _after_all_blocks_but_one,
        _MAPS
        | {
            qwen21.QwenImage21CausalConv3d,
            PatchCausalConv2d,
            qwen21.QwenImage21AttentionBlock,
            PatchFrameAttention21,
            qwen21.QwenImage21RMS_norm,
            qwen21.QwenImage21Upsample,
            qwen21.QwenImage21Resample,
            qwen21.QwenImage21DupUp3D,
            qwen21.QwenImage21ResidualBlock,
            qwen21.QwenImage21MidBlock,
            qwen21.QwenImage21UpBlock,
            qwen21.QwenImage21ResidualUpBlock,
        },
    ),
    hunyuan.HunyuanImageDecoder2D: DecoderKind(
        _in_blocks_of_their_own,
        _MAPS
        | {
            nn.GroupNorm,
            PatchGroupNorm,
            hunyuan.HunyuanImageAttentionBlock,
            PatchMapAttention,
            hunyuan.HunyuanImageUpsample,
            hunyuan.HunyuanImageResnetBlock,
            hunyuan.HunyuanImageMidBlock,
        },
    ),
}
"""By class of a decoder."""
_VAES = (
    AutoencoderKL,  # of Stable Diffusion, and of FLUX.1
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    AutoencoderKLHunyuanImage,
)


def decoder_of(pipeline: Any, local: LocalCode) -> nn.Module | None:
    """The decoder of the pipeline's VAE, if it can be cut into patches."""
    vae = getattr(pipeline, "vae", None)
    if not isinstance(vae, _VAES) or type(vae.decoder) not in KINDS:
        return None
    decoder: nn.Module = vae.decoder
    return decoder if can_be_cut(decoder, local) else None


def can_be_cut(decoder: Any, local: LocalCode | None = None, forward: Any = None) -> bool:
    """Whether all layers of a VAE's decoder are now of the kinds that are known to be cut into patches.

    Args:
        local: the code in it that works on some rows without the others.
        forward: what computes a rank's part; None is the decoder's class's.
    """
    local, kind = local or LocalCode(), KINDS[type(decoder)]
    if local.obstacle_around("the decoder", decoder, forward) is not None:
        return False
    if type(decoder) is Decoder:
        if {type(block) for block in decoder.up_blocks if not local.says(block)} - {UpDecoderBlock2D}:
            return False
        if replaced_call((AttnProcessor, AttnProcessor2_0)) is not None:
            return False
    # its own hooks see the whole picture
    inner = ((name, module) for name, module in decoder.named_modules() if module is not decoder)
    return all(_is_known(name, module, kind, local) for name, module in inner)


def _is_known(name: str, module: nn.Module, kind: DecoderKind, local: LocalCode) -> bool:
    """Whether a layer of a decoder is as it is known to be."""
    if local.obstacle(name, module, kind.layers) is not None:
        return False
    if type(module) in FORMS:  # a hook that holds the forward of one that is not cut yet would be passed by
        return keeps_size(module) and (type(module) not in PATCHED or has_class_forward(module))
    if type(module) in (qwen.QwenImageUpsample, qwen21.QwenImage21Upsample):
        return module.mode == "nearest-exact" and module.scale_factor == (2.0, 2.0)
    if is_foreign(module) or has_own_forward(module):
        return False
    if isinstance(module, nn.Conv2d):
        return module.stride == (1, 1)
    if isinstance(module, Attention):
        plain = type(module.processor) in SELF_ATTENTION and not module.spatial_norm
        return plain and has_own_scale(module)
    return type(module).__name__ != "SpatialNorm"


def convert_decoder(decoder: nn.Module, context: PatchContext) -> None:
    """Convert every layer of a decoder that `can_be_cut` and is not yet patch-parallel."""
    for module in decoder.modules():
        if isinstance(module, Attention):
            if getattr(module.processor, "context", None) is not context:
                module.processor = PatchSpatialAttention(context)
        elif type(module) in FORMS:
            patch_layer(module, context)
        else:
            convert_conv_or_norm(module, context)
    if type(decoder) in (Decoder, hunyuan.HunyuanImageDecoder2D):
        spare_messages(decoder, whole_input=type(decoder) is Decoder)


def picture_partition(decoder: nn.Module, latents: torch.Tensor, patches: int) -> Partition:
    """Partition of the picture (level 0) and of the latents (the last level) among `patches` ranks.

    Args:
        latents: (batch, channels, rows, columns), with frames behind the channels or without.

    Raises:
        InvalidRequest: fewer rows of latents than ranks.
    """
    levels = KINDS[type(decoder)].doublings(decoder)
    height, width = (side << levels for side in latents.shape[-2:])
    return Partition(height, width, levels, patches)
