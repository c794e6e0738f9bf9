"""Pipelines, layers and inputs that are supported; everything else is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.downsampling import Downsample2D
from torch import nn

from distriray.errors import UnsupportedModel
from distriray.parallel.layers.attention import PatchSelfAttention, PatchSpatialAttention
from distriray.parallel.layers.conv import PatchConv2d
from distriray.parallel.layers.group_norm import PatchGroupNorm

PIPELINES = "pipelines around a UNet2DConditionModel: Stable Diffusion 1.x, 2.x and XL"
BLOCKS = {
    "DownBlock2D",
    "CrossAttnDownBlock2D",
    "UNetMidBlock2D",
    "UNetMidBlock2DCrossAttn",
    "CrossAttnUpBlock2D",
    "UpBlock2D",
}
ADDED_EMBEDDINGS = {None, "text", "text_time"}
# Exactly these: a subclass may compute something else.
CONVOLUTIONS = {nn.Conv2d, PatchConv2d}
NORMS = {nn.GroupNorm, PatchGroupNorm}
SELF_ATTENTION = {AttnProcessor, AttnProcessor2_0, PatchSelfAttention, PatchSpatialAttention}
_SPATIAL_MODULES = {
    f"torch.nn.modules.{name}"
    for name in ("conv", "pooling", "batchnorm", "instancenorm", "upsampling", "padding", "fold")
}
# They call the convolution that they adapt, and convolutions of their own.
_ADAPTERS = ("peft.tuners.lora.", "peft.tuners.ia3.")


def unet_of(pipeline: Any) -> UNet2DConditionModel:
    """The pipeline's U-Net, if patch parallelism knows it.

    Raises:
        UnsupportedModel: another network, or a block that is not of Stable Diffusion's U-Nets.
    """
    unet = pipeline if isinstance(pipeline, UNet2DConditionModel) else getattr(pipeline, "unet", None)
    if not isinstance(unet, UNet2DConditionModel):
        network = type(unet if unet is not None else getattr(pipeline, "transformer", pipeline)).__name__
        raise UnsupportedModel(
            f"{type(pipeline).__name__} denoises with {network}; supported are {PIPELINES}"
        )
    blocks = [*unet.down_blocks, *([unet.mid_block] if unet.mid_block is not None else []), *unet.up_blocks]
    foreign = sorted({type(block).__name__ for block in blocks} - BLOCKS)
    if foreign:
        raise UnsupportedModel(
            f"U-Net blocks {', '.join(foreign)}; supported are {', '.join(sorted(BLOCKS))}"
        )
    if unet.config.addition_embed_type not in ADDED_EMBEDDINGS:
        raise UnsupportedModel(
            f"addition_embed_type {unet.config.addition_embed_type!r}; supported are text, text_time"
        )
    for name, module in unet.named_modules():
        if type(module).__name__ in ("GatedSelfAttentionDense", "DualTransformer2DModel"):
            raise UnsupportedModel(f"layer {name} is a {type(module).__name__} (GLIGEN, dual attention)")
    return unet


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


def is_foreign(module: nn.Module) -> bool:
    """Whether a layer looks at more than one position in a way that is not known to be cut into patches."""
    kind = type(module)
    adapted = getattr(module, "base_layer", None)
    if adapted is not None and any(isinstance(layer, nn.Conv2d) for layer in adapted.modules()):
        return not kind.__module__.startswith(_ADAPTERS)
    if kind in CONVOLUTIONS:
        assert isinstance(module, nn.Conv2d)
        zeros = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return not zeros or module.stride[0] not in (1, 2) or "_conv_forward" in vars(module)
    spatial = issubclass(kind, nn.GroupNorm) or any(
        base.__module__ in _SPATIAL_MODULES for base in kind.mro()
    )
    return spatial and kind not in NORMS


def has_own_forward(module: nn.Module) -> bool:
    """Whether a hook (layerwise casting, offloading) holds the forward of a layer that is not cut yet.

    Cutting it changes its class, which the hook would pass by.
    """
    return type(module) in (nn.Conv2d, nn.GroupNorm, Downsample2D) and not has_class_forward(module)


def has_class_forward(module: nn.Module) -> bool:
    """Whether a module runs the forward of its class: never hooked, or left so by a hook that was removed."""
    own = vars(module).get("forward")
    return own is None or getattr(own, "__func__", None) is type(module).forward


def image_layers(unet: UNet2DConditionModel) -> Iterator[tuple[str, nn.Module]]:
    """Layers that see the image, by name: all but those that make tokens of image prompts on every rank."""
    return ((name, m) for name, m in unet.named_modules() if not name.startswith("encoder_hid_proj"))


def check_self_attention(name: str, attn: Attention) -> None:
    """Raise `UnsupportedModel` where self-attention does more than keys and values of the same tokens."""
    if type(attn.processor) not in SELF_ATTENTION:
        raise UnsupportedModel(
            f"{name} uses {type(attn.processor).__name__}; patch parallelism brings its own self-attention: "
            "undo attention slicing, xFormers, PAG or fused projections first"
        )
    for extra in ("group_norm", "spatial_norm", "norm_q", "norm_k"):
        if getattr(attn, extra, None) is not None:
            raise UnsupportedModel(f"{name} has a {extra}, which no supported U-Net has")
    if attn.residual_connection or attn.rescale_output_factor != 1.0 or attn.added_kv_proj_dim is not None:
        raise UnsupportedModel(f"{name} is not the self-attention of a supported U-Net")


def check_layers(unet: UNet2DConditionModel) -> None:
    """Raise `UnsupportedModel` where a layer looks at the image in a way that is not known to be cut."""
    for name, module in image_layers(unet):
        if is_foreign(module):
            raise UnsupportedModel(
                f"layer {name}, {type(module).__name__}({module.extra_repr()}), is not cut into patches"
            )
        if has_own_forward(module):
            raise UnsupportedModel(
                f"a hook holds the forward of layer {name}: call enable_layerwise_casting, "
                "enable_group_offload and the like after the first image"
            )
    for name, block in unet.up_blocks.named_children():
        if getattr(block, "s1", None):
            raise UnsupportedModel(
                f"up block {name} uses FreeU, a filter over the whole image; call disable_freeu()"
            )


def check_inputs(attention_mask: object, cross_attention_kwargs: dict[str, Any] | None) -> None:
    """Raise `UnsupportedModel` for an input of the U-Net that patches cannot honour."""
    if attention_mask is not None:
        raise UnsupportedModel(
            "attention_mask is over the tokens of the whole image and is not cut into patches"
        )
    foreign = sorted(set(cross_attention_kwargs or ()) - {"scale"})
    if foreign:
        raise UnsupportedModel(
            f"cross_attention_kwargs {', '.join(foreign)}; with patches only 'scale' (LoRA) works"
        )
