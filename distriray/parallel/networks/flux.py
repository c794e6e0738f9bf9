"""FLUX.1: `FluxTransformer2DModel`."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers import FluxTransformer2DModel
from diffusers.models.normalization import AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)

from distriray.parallel.layers.tokens import PatchJointAttention
from distriray.parallel.networks.plan import Attention, Cut, Input, Plan
from distriray.parallel.networks.tokens import TokenNetwork

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


class Flux(TokenNetwork):
    """A `FluxTransformer2DModel`: a token is 2x2 latents, which the pipeline packs."""

    kind = FluxTransformer2DModel
    row_unit = 2
    plan = Plan(
        cuts=CUTS,
        attention={
            "transformer_blocks.*.attn": Attention(FluxAttnProcessor, PatchFluxAttention),
            "single_transformer_blocks.*.attn": Attention(FluxAttnProcessor, PatchFluxAttention),
        },
        inputs={
            "pooled_projections": Input("pooled prompt embeddings", "near"),
            "guidance": Input("embedded guidance scale"),
            **POSITIONS,
        },
    )
    layers = frozenset[type](
        {
            FluxAttention,
            FluxPosEmbed,
            FluxSingleTransformerBlock,
            FluxTransformerBlock,
            AdaLayerNormZeroSingle,
        }
    )
