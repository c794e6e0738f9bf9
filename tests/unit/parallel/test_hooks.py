"""Layers whose forward a hook holds, or that are not exactly of a known kind."""

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from distriray.errors import UnsupportedModel
from distriray.parallel.layers import _adopt_simple
from distriray.parallel.supported import can_be_cut


class OwnNorm(nn.GroupNorm):
    pass


def vae():
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def test_a_decoder_is_not_cut_where_a_hook_holds_a_layer():
    model = vae()
    assert can_be_cut(model.decoder)
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    assert not can_be_cut(model.decoder)


def test_a_decoder_with_a_norm_of_its_own_kind_is_not_cut():
    model = vae()
    model.decoder.conv_norm_out = OwnNorm(4, 8)
    assert not can_be_cut(model.decoder)


def test_a_hooked_layer_is_refused():
    layer = nn.Conv2d(4, 4, 3, padding=1)
    layer.forward = layer.forward
    with pytest.raises(UnsupportedModel, match="a hook holds the forward"):
        _adopt_simple(layer, None)
