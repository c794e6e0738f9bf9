"""Layers over feature maps, as U-Nets and VAEs have them: which are known to be cut, and their conversion."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl_hunyuanimage import HunyuanImageResnetBlock
from diffusers.models.resnet import ResnetBlock2D
from peft.tuners.lora import LoraLayer
from torch import nn

from distriray.parallel.context import PatchContext
from distriray.parallel.exchange.own import Computed
from distriray.parallel.exchange.step import Step
from distriray.parallel.layers.attending import attend_to_all, of_queries
from distriray.parallel.layers.attention import PatchSelfAttention, PatchSpatialAttention
from distriray.parallel.layers.bare import adapters_in_use, has_class_forward
from distriray.parallel.layers.conv import PatchConv2d, pads_by_hand, patch_conv
from distriray.parallel.layers.group_norm import PatchGroupNorm, patch_group_norm
from distriray.parallel.partition import Window
from distriray.parallel.share import Share

# Exactly these: a subclass may compute something else.
CONVOLUTIONS = {nn.Conv2d, PatchConv2d}
NORMS = {nn.GroupNorm, PatchGroupNorm}
SELF_ATTENTION = {AttnProcessor, AttnProcessor2_0, PatchSelfAttention, PatchSpatialAttention}
_SPATIAL_MODULES = {
    f"torch.nn.modules.{name}"
    for name in ("conv", "pooling", "batchnorm", "instancenorm", "upsampling", "padding", "fold")
}
# What may stand between a group norm and its convolution: of each number alone, and 0 stays 0 at the edges.
_ACTIVATIONS = {nn.SiLU, nn.ReLU, nn.GELU, nn.Mish}
_RESIDUAL_BLOCKS = {ResnetBlock2D, HunyuanImageResnetBlock}
# They call the convolution that they adapt, and convolutions of their own.
_ADAPTERS = ("peft.tuners.lora.", "peft.tuners.ia3.")


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


def adapter_of(module: nn.Module) -> str:
    """Words of an error for the adapter around a layer; empty if there is none."""
    if getattr(module, "base_layer", None) is None:
        return ""
    family = type(module).__module__.removeprefix("peft.tuners.").partition(".")[0]
    return f": it is an adapter ({family}), and on convolutions only LoRA and IA3 are"


def has_own_forward(module: nn.Module) -> bool:
    """Whether a hook (layerwise casting, offloading) holds the forward of a layer that is not cut yet.

    Cutting it changes its class, which the hook would pass by.
    """
    changes = type(module) in (nn.Conv2d, nn.GroupNorm) or pads_by_hand(module)
    return changes and not has_class_forward(module)


def convert_conv_or_norm(module: nn.Module, context: PatchContext) -> bool:
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


def adapted_convolutions(network: nn.Module) -> list[LoraLayer]:
    """The convolutions of a network that have LoRAs around them."""
    layers = (layer for layer in network.modules() if isinstance(layer, LoraLayer))
    return [layer for layer in layers if isinstance(layer.get_base_layer(), nn.Conv2d)]


def _idle_convolutions(network: nn.Module) -> Iterator[nn.Module]:
    """The convolutions of LoRAs that are loaded and not in use."""
    for layer in adapted_convolutions(network):
        in_use = adapters_in_use(layer)
        yield from (conv for name, conv in layer.lora_A.items() if name not in in_use)


def spare_messages(network: Any, whole_input: bool = True) -> None:
    """Let no convolution ask its peers for rows that come without a message of their own.

    Those behind a group norm come with its statistics. The first convolution takes its own from the network's
    input, which every rank has whole.

    Args:
        network: with diffusers' names of layers; all that can be converted is.
        whole_input: only the first convolution reads the network's input, and can be given all of it.
    """
    for module in network.modules():
        if isinstance(module, PatchConv2d):
            module.halos_from = None
        elif isinstance(module, PatchGroupNorm):
            module.window = None
    if whole_input:
        _give_halos(network.conv_in, "whole")
    for norm, conv in _norms_with_convolutions(network):
        norm.window = _give_halos(conv, "norm")


def dry_run_layers(network: Any, dtype: torch.dtype, share: Share, step: Step) -> None:
    """Hand `step` what the layers of a network with diffusers' blocks would, in tensors without values."""
    partition, rank = share.partition, share.communicator.rank

    def whole(channels: int, level: int) -> torch.Tensor:
        return torch.empty((share.images, channels, *partition.shape(level)), dtype=dtype, device="meta")

    def own(channels: int, level: int) -> torch.Tensor:
        return whole(channels, level)[:, :, : partition.counts(level)[rank]]

    idle = set(_idle_convolutions(network))
    for name, layer in network.named_modules():
        level = _level_of(name, partition.levels)
        if isinstance(layer, PatchGroupNorm):
            rows = own(layer.num_channels, level)
            if layer.window is None or not step.fuses:
                step.send_statistics(step.read_statistics(rows, layer.num_groups))
            else:
                step.rows_around(rows, layer.window, layer.num_groups, lambda own: None)
        elif isinstance(layer, PatchConv2d):
            reads_more = not layer.kernel_size[0] == layer.stride[0] == 1
            if not reads_more or layer in idle:
                continue
            if layer.halos_from is None or (layer.halos_from == "norm" and not step.fuses):
                step.padded(own(layer.in_channels, level), layer.window)
        elif isinstance(getattr(layer, "processor", None), PatchSelfAttention):
            key = own(layer.to_k.out_features, level).flatten(2).transpose(1, 2)
            query = key.unflatten(2, (layer.heads, -1))
            attend_to_all(step, query, Computed(key, key), step.tokens_like(key.shape[1]), of_queries)


def _level_of(name: str, levels: int) -> int:
    """How often the input of a layer, by its name in a U-Net or ControlNet, was halved."""
    place, index, *_ = f"{name}..".split(".")
    match place:
        case "down_blocks":
            return int(index or 0)
        case "mid_block":
            return levels
        case "up_blocks":
            return levels - int(index or 0) - (".upsamplers." in name)
    return 0


def takes_whole(network: Any) -> bool:
    """Whether the first convolution, in a step, is to be given the rows of all ranks."""
    return any(conv.halos_from == "whole" for conv in _wide(network.conv_in))


def _give_halos(layer: Any, source: Literal["norm", "whole"]) -> Window | None:
    """Let the convolutions of a layer find halo rows in its input, if they all read that, with one window.

    Returns:
        The window; None where that is not known.
    """
    readers = [getattr(layer, "base_layer", layer), *getattr(layer, "lora_A", {}).values()]
    wide = _wide(layer)
    if set(wide) != set(readers) or len({conv.window for conv in wide}) != 1:
        return None
    for conv in wide:
        conv.halos_from = source
    return wide[0].window


def _norms_with_convolutions(network: Any) -> Iterator[tuple[PatchGroupNorm, nn.Module]]:
    """Group norms, and the layer that alone reads what they give, but for an activation."""
    for block in network.modules():
        if type(block) not in _RESIDUAL_BLOCKS or type(block.nonlinearity) not in _ACTIVATIONS:
            continue
        if all(getattr(block, resampling, None) is None for resampling in ("upsample", "downsample")):
            yield block.norm1, block.conv1
        if getattr(block, "time_embedding_norm", "default") == "default":
            yield block.norm2, block.conv2
    for norm, activation in (("conv_norm_out", "conv_act"), ("norm_out", "nonlinearity")):
        last = getattr(network, norm, None)  # ControlNets have none
        if type(last) is PatchGroupNorm and type(getattr(network, activation)) in _ACTIVATIONS:
            yield last, network.conv_out


def _wide(layer: nn.Module) -> list[PatchConv2d]:
    """The convolutions within a layer that read more than one row."""
    convs = [module for module in layer.modules() if isinstance(module, PatchConv2d)]
    return [conv for conv in convs if conv.kernel_size[0] > 1]
