"""Layers that are not exactly of a known kind, or whose forward a hook holds."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from distriray import parallelize
from distriray.collective import connect
from distriray.errors import UnsupportedModel
from distriray.parallel.networks.vae import can_be_cut
from tests.cases import Case, call
from tests.models import tiny_sdxl, tiny_vae


class OwnNorm(nn.GroupNorm):
    pass


class OwnConvolution(nn.Conv2d):
    pass


class OwnProcessor(AttnProcessor2_0):
    pass


STRANGE = [OwnNorm(4, 16), OwnConvolution(16, 16, 3, padding=1), nn.InstanceNorm2d(16), nn.AvgPool2d(1)]


@pytest.mark.parametrize("layer", STRANGE, ids=lambda layer: type(layer).__name__)
def test_a_layer_that_is_not_exactly_of_a_known_kind_is_not_cut(layer: nn.Module) -> None:
    vae, pipeline = tiny_vae(), tiny_sdxl()
    assert can_be_cut(vae.decoder)
    vae.decoder.conv_act = layer
    assert not can_be_cut(vae.decoder)
    parallelize(pipeline, connect("local"))
    pipeline.unet.conv_act = layer
    with pytest.raises(UnsupportedModel, match=f"layer conv_act, {type(layer).__name__}"):
        call(pipeline, Case())


def circular(convolution: nn.Conv2d) -> None:
    convolution.padding_mode = "circular"


def replaced(convolution: nn.Conv2d) -> None:
    convolution._conv_forward = convolution._conv_forward


@pytest.mark.parametrize("change", [circular, replaced])
def test_a_convolution_that_was_changed_is_refused_also_after_an_image(
    change: Callable[[nn.Conv2d], None],
) -> None:
    vae, pipeline = tiny_vae(), parallelize(tiny_sdxl(), connect("local"))
    call(pipeline, Case())
    change(vae.decoder.conv_in)
    change(pipeline.unet.conv_in)
    assert not can_be_cut(vae.decoder)
    with pytest.raises(UnsupportedModel, match="layer conv_in, PatchConv2d"):
        call(pipeline, Case())


def test_adapters_that_convolve_by_themselves_are_refused() -> None:
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    pipeline = parallelize(tiny_sdxl(), connect("local"))
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["conv1"]))
    call(pipeline, Case())
    for kind, name in ((LoHaConfig, "loha"), (LoKrConfig, "lokr")):
        pipeline.unet.delete_adapters("default")
        pipeline.unet.add_adapter(kind(r=2, target_modules=["conv1"]))
        with pytest.raises(UnsupportedModel, match=rf"conv1, Conv2d\(\), .*an adapter \({name}\)"):
            call(pipeline, Case())


def test_what_a_removed_hook_has_left_does_not_count() -> None:
    pipeline = tiny_sdxl()
    convolution = pipeline.unet.conv_in
    convolution.forward = types.MethodType(type(convolution).forward, convolution)
    call(parallelize(pipeline, connect("local")), Case())
    assert "forward" not in vars(convolution)


def test_an_attention_processor_of_ones_own_is_not_replaced() -> None:
    vae, pipeline = tiny_vae(), tiny_sdxl()
    vae.decoder.mid_block.attentions[0].set_processor(OwnProcessor())
    assert not can_be_cut(vae.decoder)
    parallelize(pipeline, connect("local"))
    pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(OwnProcessor())
    with pytest.raises(UnsupportedModel, match="OwnProcessor"):
        call(pipeline, Case())


def test_a_layer_whose_forward_a_hook_holds_is_not_cut() -> None:
    vae, pipeline = tiny_vae(), tiny_sdxl()
    for network in (vae, pipeline.unet):
        network.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    assert not can_be_cut(vae.decoder)
    with pytest.raises(UnsupportedModel, match="a hook holds the forward of layer conv_in"):
        call(parallelize(pipeline, connect("local")), Case())
