"""FLUX.1: `FluxTransformer2DModel`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from diffusers.models.normalization import AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)

from distriray.errors import UnsupportedModel
from distriray.parallel.layers.tokens import PatchJointAttention, Tokens
from distriray.parallel.networks.controls import UsedControl
from distriray.parallel.networks.local import LocalCode
from distriray.parallel.networks.plan import Attention, Cut, Input, Plan
from distriray.parallel.networks.token_control import Added, TokenControl, repeated
from distriray.parallel.networks.tokens import TokenNetwork
from distriray.parallel.share import Share

# FLUX.2 has these too.
CUTS: Mapping[str, Mapping[str | int, Cut]] = {
    "": {
        "hidden_states": ("image", 1),
        "encoder_hidden_states": ("text", 1),
        "img_ids": ("image", -2),
        "txt_ids": ("text", -2),
    }
}
POSITIONS = {
    "img_ids": Input("positions of the image's tokens", batched=False),
    "txt_ids": Input("positions of the text's tokens", batched=False),
}


class PatchFluxAttention(PatchJointAttention, FluxAttnProcessor):
    """Attention of FLUX.1, in its blocks of both kinds."""


ATTENTION = {
    "transformer_blocks.*.attn": Attention(FluxAttnProcessor, PatchFluxAttention),
    "single_transformer_blocks.*.attn": Attention(FluxAttnProcessor, PatchFluxAttention),
}
LAYERS = frozenset[type](
    {FluxAttention, FluxPosEmbed, FluxSingleTransformerBlock, FluxTransformerBlock, AdaLayerNormZeroSingle}
)


# A union's text begins with a token for the kind of its picture, which its forward puts there.
OF_A_UNION: Mapping[str, Mapping[str | int, Cut]] = {
    "pos_embed": {0: ("joint", 0), 1: ("joint", 0)},
    "transformer_blocks.0": {"hidden_states": ("image", 1), "encoder_hidden_states": ("text", 1)},
}


class FluxControl(TokenControl):
    """A `FluxControlNetModel`, whose picture is given as packed latents; some are unions of several."""

    kind = FluxControlNetModel
    plan = Plan(cuts={"": {**CUTS[""], "controlnet_cond": ("image", 1)}}, attention=ATTENTION, inputs={})
    layers = LAYERS
    like = (
        "in_channels",
        "num_attention_heads",
        "attention_head_dim",
        "joint_attention_dim",
        "pooled_projection_dim",
        "axes_dims_rope",
    )

    def __init__(self, module: Any, local: LocalCode | None = None, tokens: Tokens | None = None) -> None:
        if module.union:
            self.plan = replace(type(self).plan, cuts=OF_A_UNION, whole=("pos_embed",))
        super().__init__(module, local, tokens)

    @classmethod
    def check_fits(cls, network: Any, transformer: Any) -> None:
        super().check_fits(network, transformer)
        if network.config.guidance_embeds and not transformer.config.guidance_embeds:
            raise UnsupportedModel("it takes a guidance scale, and the model has none")
        hint, side = network.config.conditioning_embedding_channels, network.config.patch_size
        if hint is not None and hint * side**2 != network.config.in_channels:
            raise UnsupportedModel(
                f"its picture's tokens are of {side} by {side} with {hint} channels, and not with "
                f"{network.config.in_channels} in all, which it takes"
            )
        if network.union and not network.transformer_blocks:
            raise UnsupportedModel("it is a union without blocks of two streams")

    def of_share(self, share: Share) -> Share:
        if not self.module.union:
            return share
        return replace(share, partition=replace(share.tokens, text=share.tokens.text + 1))

    @staticmethod
    def arguments(control: UsedControl, given: Mapping[str, Any]) -> dict[str, Any]:
        names = (
            "hidden_states",
            "encoder_hidden_states",
            "pooled_projections",
            "timestep",
            "img_ids",
            "txt_ids",
        )
        arguments = {name: given[name] for name in names}
        sample = arguments["hidden_states"]
        if control.network.config.guidance_embeds:
            arguments["guidance"] = given["guidance"]
        if control.mode is not None:
            arguments["controlnet_mode"] = sample.new_full((len(sample), 1), control.mode, dtype=torch.long)
        return arguments

    @staticmethod
    def spread(network: Any, transformer: Any, output: Any) -> dict[str, Added]:
        of_both, of_one = output
        in_turn = network.config.conditioning_embedding_channels is not None  # as those of XLabs are made
        return {
            "controlnet_block_samples": repeated(of_both, transformer.transformer_blocks, in_turn),
            "controlnet_single_block_samples": repeated(of_one, transformer.single_transformer_blocks),
        }


class Flux(TokenNetwork):
    """A `FluxTransformer2DModel`: a token is 2x2 latents, which the pipeline packs."""

    kind = FluxTransformer2DModel
    row_unit = 2
    control = FluxControl
    plan = Plan(
        cuts=CUTS,
        attention=ATTENTION,
        inputs={
            "pooled_projections": Input("pooled prompt embeddings", "near"),
            "guidance": Input("embedded guidance scale"),
            "controlnet_blocks_repeat": Input("turns of ControlNet residuals", "plain", batched=False),
            **POSITIONS,
        },
        residuals=("controlnet_block_samples", "controlnet_single_block_samples"),
    )
    layers = LAYERS
