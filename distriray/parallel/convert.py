"""Replaces the layers of a U-Net or a VAE's decoder by patch-parallel ones, which share their parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.downsampling import Downsample2D
from torch import nn

from distriray.parallel.layers.attention import (
    CachedCrossAttention,
    PatchSelfAttention,
    PatchSpatialAttention,
)
from distriray.parallel.layers.conv import patch_conv, patch_downsample
from distriray.parallel.layers.group_norm import patch_group_norm
from distriray.parallel.supported import check_layers, check_self_attention, image_layers

if TYPE_CHECKING:
    from distriray.parallel.engine import Engine
    from distriray.parallel.exchange.exchange import Exchanging


def adopt_layers(unet: UNet2DConditionModel, engine: Engine) -> bool:
    """Make every layer patch-parallel that is not yet; whether there was one (a LoRA was loaded, say).

    Raises:
        UnsupportedModel: a layer that cannot be cut into patches.
    """
    check_layers(unet)
    adopted = False
    for name, module in image_layers(unet):
        if isinstance(module, Attention):
            adopted |= _adopt_attention(name, module, engine)
        else:
            adopted |= _adopt_simple(module, engine)
    for _, module in image_layers(unet):
        if type(module) is Downsample2D:
            vars(module).pop("forward", None)
            patch_downsample(module)
    return adopted


def adopt_decoder_layers(decoder: Decoder, engine: Exchanging) -> None:
    """Make every layer of a decoder that `decoder_of` has returned patch-parallel that is not yet."""
    for module in decoder.modules():
        if isinstance(module, Attention):
            if getattr(module.processor, "engine", None) is not engine:
                module.processor = PatchSpatialAttention(engine)
        else:
            _adopt_simple(module, engine)


def _adopt_simple(module: nn.Module, engine: Exchanging) -> bool:
    """Adopt a convolution or a group norm that is not yet; whether it was one."""
    if not isinstance(module, nn.Conv2d | nn.GroupNorm) or getattr(module, "engine", None) is engine:
        return False
    if type(module) in (nn.Conv2d, nn.GroupNorm):
        vars(module).pop("forward", None)  # left by a hook that was removed; it is not the new class's
    if isinstance(module, nn.Conv2d):
        patch_conv(module, engine)
    else:
        patch_group_norm(module, engine)
    return True


def _adopt_attention(name: str, attn: Attention, engine: Engine) -> bool:
    processor = attn.processor
    if attn.is_cross_attention:
        # Local as it stands: text or image-prompt tokens are on every rank. Only the default is cached.
        unbound = isinstance(processor, CachedCrossAttention) and processor.engine is not engine
        if type(processor) not in (AttnProcessor, AttnProcessor2_0) and not unbound:
            return False
        attn.processor = CachedCrossAttention(engine)
    else:
        if isinstance(processor, PatchSelfAttention) and processor.engine is engine:
            return False
        check_self_attention(name, attn)
        attn.processor = PatchSelfAttention(engine)
    return True
