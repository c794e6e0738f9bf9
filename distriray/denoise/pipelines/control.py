"""A U-Net with ControlNets beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from distriray.parallel import engine_of
from distriray.parallel.networks.controlnet import Control, residuals_of


def controlled(
    unet: Any, controls: Sequence[Control], sample: torch.Tensor, timestep: torch.Tensor, **arguments: Any
) -> Any:
    """What a U-Net gives with ControlNets, which its gang cuts into patches with it if it has one.

    Args:
        sample: (batch, channels, rows, columns), scaled as the U-Net takes it.
        arguments: the others of the U-Net, by name.
    """
    if controls and engine_of(unet) is not None:
        arguments["controls"] = controls
    elif controls:
        text, added = arguments["encoder_hidden_states"], arguments.get("added_cond_kwargs")
        arguments |= residuals_of(controls, lambda _: sample, timestep, text, added)
    return unet(sample, timestep, **arguments)
