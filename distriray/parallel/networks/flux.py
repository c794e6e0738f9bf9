"""FLUX.1: `FluxTransformer2DModel`."""

from __future__ import annotations

import torch
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
from distriray.parallel.networks.plan import Attention, Input, Plan
from distriray.parallel.networks.tokens import TokenNetwork


class PatchFluxAttention(PatchJointAttention, FluxAttnProcessor):
    """That of FLUX.1, in its blocks of both kinds."""


class Flux(TokenNetwork):
    """A `FluxTransformer2DModel`: a token is 2x2 latents, which the pipeline packs."""

    kind = FluxTransformer2DModel
    row_unit = 2
    plan = Plan(
        cuts={
            "": {
                "hidden_states": ("image", 1),
                "encoder_hidden_states": ("text", 1),
                "img_ids": ("image", -2),
                "txt_ids": ("text", -2),
            }
        },
        attention={
            "transformer_blocks.*.attn": Attention(FluxAttnProcessor, PatchFluxAttention),
            "single_transformer_blocks.*.attn": Attention(FluxAttnProcessor, PatchFluxAttention),
        },
        inputs={
            "pooled_projections": Input("pooled prompt embeddings", "near"),
            "guidance": Input("embedded guidance scale"),
            "img_ids": Input("positions of the image's tokens", batched=False),
            "txt_ids": Input("positions of the text's tokens", batched=False),
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

    def image_tokens(self, sample: torch.Tensor) -> int:
        return sample.shape[1]
