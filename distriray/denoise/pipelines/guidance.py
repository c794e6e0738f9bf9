"""Classifier-free guidance of both branches in one batch."""

from __future__ import annotations

import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg

from distriray.denoise.state import DenoiseState


def guided(output: torch.Tensor, state: DenoiseState) -> torch.Tensor:
    """The network's output for [unconditional, conditional] by the scale and the rescaling of a state.

    Args:
        output: (2 x batch, channels, rows, columns).
    """
    without, conditional = output.chunk(2)
    output = without + state.guidance_scale * (conditional - without)
    if state.guidance_rescale > 0.0:
        output = rescale_noise_cfg(output, conditional, guidance_rescale=state.guidance_rescale)
    return output
