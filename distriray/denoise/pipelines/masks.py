"""Filling in masks by networks that take latents alone: outside the mask, the picture's stay."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from distriray.denoise.pipelines.base import Commission
from distriray.denoise.state import DenoiseState


def outside(
    pipeline: Any,
    commission: Commission,
    noise: torch.Tensor,
    image_latents: torch.Tensor,
    mode: str = "nearest",
) -> dict[str, torch.Tensor]:
    """The values that `keep_outside` goes by, where a pipeline's methods know only how to pack a mask.

    Args:
        pipeline: whose `mask_processor` makes a mask of black and white.
        noise, image_latents: of the same shape, (batch, channels, rows, columns).
        mode: how the mask is scaled to that.

    Returns:
        Those, and `mask`, (1, 1, rows, columns), 1 where to fill in.
    """
    mask = pipeline.mask_processor.preprocess(commission.mask_image, commission.height, commission.width)
    mask = F.interpolate(mask, size=noise.shape[2:], mode=mode).to(noise)
    return {"mask": mask, "noise": noise, "image_latents": image_latents}


def keep_outside(state: DenoiseState, latents: torch.Tensor) -> torch.Tensor:
    """Latents after a step inside the mask; outside it the picture's, as noisy as the next step wants them.

    Those of a state without `image_latents` stay as they are: it has no mask, or the network takes it.
    """
    values, scheduler = state.values, state.scheduler
    kept = values.get("image_latents")
    if kept is None:
        return latents
    if state.step + 1 < state.num_steps:
        following = values["timesteps"][state.step + 1 : state.step + 2]
        if hasattr(scheduler, "scale_noise"):
            kept = scheduler.scale_noise(kept, following, values["noise"])
        else:
            kept = scheduler.add_noise(kept, values["noise"], following)
    filled: torch.Tensor = (1 - values["mask"]) * kept + values["mask"] * latents
    return filled
