"""ControlNets of a U-Net: what they take, and what they add to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import nn

from distriray.errors import UnsupportedModel
from distriray.parallel.networks.controls import UsedControl, check_same

_REFUSED = ("encoder_hid_dim", "class_embed_type", "num_class_embeds", "global_pool_conditions")


def residuals_of(
    controls: Sequence[UsedControl],
    sample: Callable[[nn.Module], torch.Tensor],
    timestep: torch.Tensor,
    text: torch.Tensor,
    added: dict[str, torch.Tensor] | None,
) -> dict[str, Any]:
    """Residuals that ControlNets add to a U-Net, by the names of its arguments; that of several is added up.

    Args:
        sample: of a network's latents, scaled as the U-Net takes them; what follows the latents' channels,
            such as a mask, is left out.
        text: prompt embeddings, (batch, tokens, channels).
        added: `added_cond_kwargs` of the U-Net.

    Source: Zhang et al., ICCV 2023 (arXiv 2302.05543).
    """
    down: list[torch.Tensor] = []
    middle: torch.Tensor | None = None
    for control in controls:
        latents = sample(control.network)[:, : control.network.config.in_channels]
        parts, part = control.network(
            latents,
            timestep,
            encoder_hidden_states=text,
            controlnet_cond=control.picture,
            conditioning_scale=control.scale,
            added_cond_kwargs=added,
            return_dict=False,
        )
        down = [before + own for before, own in zip(down, parts, strict=True)] if down else list(parts)
        middle = part if middle is None else middle + part
    return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}


class Embedder(nn.Module):
    """The first layers of a ControlNet, which see its picture alone and not the latents.

    Args:
        network: of which they were a part.
    """

    def __init__(self, network: ControlNetModel) -> None:
        super().__init__()
        self.layers = network.controlnet_cond_embedding
        self.flips = network.config.controlnet_conditioning_channel_order == "bgr"

    @torch.no_grad()
    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        """Of (1, 3, height, width) from 0 to 1, red first: (1, channels, rows, columns) of latents' size."""
        embedded: torch.Tensor = self.layers(picture.flip(1) if self.flips else picture)
        return embedded


def split(network: ControlNetModel) -> Embedder:
    """Take the layers that see the picture alone out of a ControlNet, which then takes what they make of it.

    They are the same in every step, and would need halo rows of the whole picture.
    """
    embedder = Embedder(network)
    network.controlnet_cond_embedding = nn.Identity()
    network.register_to_config(controlnet_conditioning_channel_order="rgb")
    return embedder


def check_fits(network: ControlNetModel, unet: Any) -> None:
    """Raise UnsupportedModel, with what is wrong, unless a ControlNet is one for this U-Net, cut or whole."""
    own, its = network.config, unet.config
    for name in _REFUSED:
        if own.get(name):
            raise UnsupportedModel(f"its {name} is {own[name]!r}, and ControlNets with one are not read")
    for name in ("block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type"):
        check_same(name, own.get(name), its.get(name))
    if own.get("projection_class_embeddings_input_dim") != its.get("projection_class_embeddings_input_dim"):
        raise UnsupportedModel("its size conditions and pooled text are of another width than the model's")
    if own.conditioning_channels != 3:
        raise UnsupportedModel(f"its pictures have {own.conditioning_channels} channels, and not three")
    if (network.mid_block is None) != (unet.mid_block is None):
        raise UnsupportedModel("it has no middle block like that of the model")
