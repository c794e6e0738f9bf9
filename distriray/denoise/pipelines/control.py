"""A U-Net with what a request adds to it: ControlNets beside it, and image prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import ControlNetModel

from distriray.denoise.pipelines.base import Commission, PictureOf, PipelineSteps
from distriray.denoise.pipelines.image_prompts import ImagePrompt, embeds_of
from distriray.denoise.pipelines.prompted import PromptedUNet
from distriray.parallel import engine_of
from distriray.parallel.networks.controlnet import Embedder, check_fits, residuals_of, split
from distriray.parallel.networks.controls import UsedControl


class UNetSteps(PipelineSteps):
    """A pipeline around a U-Net."""

    prompted = PromptedUNet

    @property
    def control_kind(self) -> type[Any]:
        return ControlNetModel

    def take_control(self, network: Any) -> PictureOf:
        check_fits(network, self.pipeline.unet)
        return partial(self._embedded, split(network))

    def _embedded(self, embedder: Embedder, pixels: torch.Tensor, commission: Commission) -> torch.Tensor:
        unet = self.pipeline.unet
        embedded: torch.Tensor = embedder(pixels.to(unet.device, unet.dtype))
        return embedded


def controlled(
    unet: Any,
    controls: Sequence[UsedControl],
    image_prompts: Sequence[ImagePrompt],
    branches: int,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    **arguments: Any,
) -> Any:
    """The output of a U-Net with ControlNets, which its gang cuts into patches with it if it has one.

    Args:
        image_prompts: of the IP-Adapters in the U-Net.
        branches: of guidance in the batch: both, unconditional first, or the conditional one alone.
        sample: (batch, channels, rows, columns), scaled as the U-Net takes it.
        arguments: the others of the U-Net, by name.
    """
    parallel = engine_of(unet) is not None
    if image_prompts:
        embeds = embeds_of(image_prompts, branches, len(sample) // branches)
        arguments["added_cond_kwargs"] = {
            **(arguments.get("added_cond_kwargs") or {}),
            "image_embeds": embeds,
        }
        if parallel:
            arguments["image_prompts"] = tuple(prompt.name for prompt in image_prompts)
    if controls and parallel:
        arguments["controls"] = controls
    elif controls:
        text, added = arguments["encoder_hidden_states"], arguments.get("added_cond_kwargs")
        arguments |= residuals_of(controls, lambda _: sample, timestep, text, added)
    return unet(sample, timestep, **arguments)
