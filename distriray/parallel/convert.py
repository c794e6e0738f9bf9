"""Conversion of a network's layers to patch-parallel ones, which share their parameters."""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.downsampling import Downsample2D
from torch import nn

from distriray.parallel.context import PatchContext
from distriray.parallel.layers.attention import (
    CachedCrossAttention,
    PatchSelfAttention,
    PatchSpatialAttention,
)
from distriray.parallel.layers.conv import patch_conv, patch_downsample
from distriray.parallel.layers.group_norm import patch_group_norm
from distriray.parallel.supported import check_layers, check_self_attention, image_layers


def convert_layers(unet: UNet2DConditionModel, context: PatchContext) -> bool:
    """Convert every layer that is not yet patch-parallel; return whether any was (a LoRA was loaded, say).

    Raises:
        UnsupportedModel: a layer that cannot be cut into patches.
    """
    check_layers(unet)
    converted = False
    for name, module in image_layers(unet):
        if isinstance(module, Attention):
            converted |= _convert_attention(name, module, context)
        else:
            converted |= _convert_simple(module, context)
    for _, module in image_layers(unet):
        if type(module) is Downsample2D:
            vars(module).pop("forward", None)
            patch_downsample(module)
    return converted


def convert_decoder_layers(decoder: Decoder, context: PatchContext) -> None:
    """Convert every layer of a decoder from `decoder_of` that is not yet patch-parallel."""
    for module in decoder.modules():
        if isinstance(module, Attention):
            if getattr(module.processor, "context", None) is not context:
                module.processor = PatchSpatialAttention(context)
        else:
            _convert_simple(module, context)


def _convert_simple(module: nn.Module, context: PatchContext) -> bool:
    """Convert a convolution or a group norm that is not yet converted; return whether it was one."""
    if not isinstance(module, nn.Conv2d | nn.GroupNorm) or getattr(module, "context", None) is context:
        return False
    if type(module) in (nn.Conv2d, nn.GroupNorm):
        vars(module).pop("forward", None)  # left by a hook that was removed; it is not the new class's
    if isinstance(module, nn.Conv2d):
        patch_conv(module, context)
    else:
        patch_group_norm(module, context)
    return True


def _convert_attention(name: str, attn: Attention, context: PatchContext) -> bool:
    processor = attn.processor
    if attn.is_cross_attention:
        # Local as it stands: text or image-prompt tokens are on every rank. Only the default is cached.
        unbound = isinstance(processor, CachedCrossAttention) and processor.context is not context
        if type(processor) not in (AttnProcessor, AttnProcessor2_0) and not unbound:
            return False
        attn.processor = CachedCrossAttention(context)
    else:
        if isinstance(processor, PatchSelfAttention) and processor.context is context:
            return False
        check_self_attention(name, attn)
        attn.processor = PatchSelfAttention(context)
    return True
