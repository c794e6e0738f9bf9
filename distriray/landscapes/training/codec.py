"""The best linear f8 code of the pictures, written into an `AutoencoderKL` as the start of its training.

Eight principal components of 8x8 patches restore these soft pictures at about 35 dB, which random weights
take hours to reach. Three strided convolutions are the components, split into 2x2 steps. Residual branches
start at zero. Left in the way is `GroupNorm -> SiLU -> convolution` at the end of each half: two large
constant channels make the norm's statistics constant, and silu(x) - silu(-x) = x undoes the activation.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional

CONSTANT = 40.0
LOG_VARIANCE = -10.0


def to_blocks(features: Tensor) -> Tensor:
    """(N, C, H, W) to (N, 4C, H/2, W/2); channel 4c + 2p + q is phase (p, q) of channel c."""
    return functional.pixel_unshuffle(features, 2)


def principal(features: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` strongest components, (count, C), their deviations, and the features' mean, (C,)."""
    flat = features.permute(1, 0, 2, 3).flatten(1).double()
    mean = flat.mean(dim=1, keepdim=True)
    strength, vectors = torch.linalg.eigh((flat - mean) @ (flat - mean).T / flat.shape[1])
    order = strength.argsort(descending=True)[:count]
    return vectors[:, order].T.float(), strength[order].sqrt().float(), mean[:, 0].float()


@torch.no_grad()
def start_linear(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Sets the encoder to the principal components of `pictures`, (N, 3, H, W) in [-1, 1].

    A component is scaled by the square root of its deviation, between the pixels' own scale (fine components
    would drown in a diffusion model's noise) and equal scales (they would cost it as much as coarse ones).
    """
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            _clear(module.conv2)
    quarter, _, _ = principal(to_blocks(to_blocks(pictures)), 32)
    eighth = functional.conv2d(to_blocks(to_blocks(pictures)), quarter[:, :, None, None])
    latent_channels = vae.config.latent_channels
    last, deviation, mean = principal(to_blocks(eighth), latent_channels)
    last = last / deviation.sqrt()[:, None] / deviation.mean().sqrt()

    encoder = vae.encoder
    _clear(
        encoder.conv_in, *(block.downsamplers[0].conv for block in encoder.down_blocks[:3]), encoder.conv_out
    )
    encoder.conv_in.weight[:3, :, 1, 1] = torch.eye(3)
    steps = torch.eye(12), quarter, last
    for block, step in zip(encoder.down_blocks, steps, strict=False):
        weight = block.downsamplers[0].conv.weight
        weight[: len(step), : step.shape[1] // 4, :2, :2] = step.reshape(len(step), -1, 2, 2)
    encoder.down_blocks[2].downsamplers[0].conv.bias[:latent_channels] = -last @ mean
    for block, carried in ((encoder.down_blocks[1], 12), (encoder.down_blocks[2], 32)):
        shortcut = block.resnets[0].conv_shortcut
        _clear(shortcut)
        shortcut.weight[:carried, :carried, 0, 0] = torch.eye(carried)
    shortcut = encoder.down_blocks[3].resnets[0].conv_shortcut
    _clear(shortcut)
    shortcut.weight[:, :, 0, 0] = 0
    _pass_norm(shortcut, encoder.conv_norm_out, encoder.conv_out, latent_channels)
    _clear(vae.quant_conv, vae.post_quant_conv)
    vae.quant_conv.weight[:, :, 0, 0] = torch.eye(2 * latent_channels)
    vae.quant_conv.bias[latent_channels:] = LOG_VARIANCE
    vae.post_quant_conv.weight[:, :, 0, 0] = torch.eye(latent_channels)

    for convolution in _decoder_chain(vae):
        nn.init.xavier_normal_(convolution.weight)
        _bias(convolution).zero_()


@torch.no_grad()
def patch_code(vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """The encoder as one convolution of stride 8: kernel, (C, 3, 8, 8), and bias, (C,), of the latents' mean.

    It is linear in 8x8 patches, so its answers to 193 single patches say all about it.
    """
    patches = torch.cat([torch.zeros(1, 192), torch.eye(192)]).view(193, 3, 8, 8).to(vae.device)
    answers = vae.encode(patches).latent_dist.mean[:, :, 0, 0]
    return (answers[1:] - answers[0]).T.reshape(-1, 3, 8, 8), answers[0]


@torch.no_grad()
def _clear(*convolutions: nn.Conv2d) -> None:
    for convolution in convolutions:
        convolution.weight.zero_()
        _bias(convolution).zero_()


def _bias(convolution: nn.Conv2d) -> Tensor:
    assert convolution.bias is not None
    return convolution.bias


@torch.no_grad()
def _pass_norm(before: nn.Conv2d, norm: nn.GroupNorm, after: nn.Conv2d, count: int) -> None:
    """Carries the first `count` inputs of `before`, as they are and negated, past norm and SiLU."""
    width = norm.num_channels // norm.num_groups
    before.weight[:count, :count, 0, 0] = torch.eye(count)
    before.weight[count : 2 * count] = -before.weight[:count]
    bias = _bias(before)
    bias[count : 2 * count] = -bias[:count]
    for group in range(norm.num_groups):
        bias[(group + 1) * width - 2], bias[(group + 1) * width - 1] = CONSTANT, -CONSTANT
    norm.weight.fill_(CONSTANT * (2 / width) ** 0.5)
    norm.bias.zero_()
    _clear(after)
    after.weight[:count, :count, 1, 1] = torch.eye(count)
    after.weight[:count, count : 2 * count, 1, 1] = -torch.eye(count)


def _decoder_chain(vae: AutoencoderKL) -> list[nn.Conv2d]:
    decoder = vae.decoder
    chain = [decoder.conv_in]
    for block in decoder.up_blocks:
        if block.resnets[0].conv_shortcut is not None:
            chain.append(block.resnets[0].conv_shortcut)
        if block.upsamplers is not None:
            chain.append(block.upsamplers[0].conv)
    return chain


def decode_linearly(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """The decoder without residual branches, norm and activation: latents (N, C, h, w) to (N, 3, 8h, 8w)."""
    features = vae.decoder.conv_in(latents)
    for block in vae.decoder.up_blocks:
        if block.resnets[0].conv_shortcut is not None:
            features = block.resnets[0].conv_shortcut(features)
        if block.upsamplers is not None:
            features = block.upsamplers[0](features)
    return features[:, :3]


@torch.no_grad()
def finish_linear(vae: AutoencoderKL) -> None:
    """Carries what `decode_linearly` gives past the decoder's last norm and activation."""
    decoder = vae.decoder
    shortcut = decoder.up_blocks[-1].resnets[0].conv_shortcut
    weight, bias = shortcut.weight[:3].clone(), shortcut.bias[:3].clone()
    _clear(shortcut)
    _pass_norm(shortcut, decoder.conv_norm_out, decoder.conv_out, 3)
    shortcut.weight[:3], shortcut.weight[3:6] = weight, -weight
    shortcut.bias[:3], shortcut.bias[3:6] = bias, -bias
