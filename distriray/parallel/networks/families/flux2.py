"""FLUX.2: `Flux2Transformer2DModel`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Attention,
    Flux2AttnProcessor,
    Flux2FeedForward,
    Flux2Modulation,
    Flux2ParallelSelfAttention,
    Flux2ParallelSelfAttnProcessor,
    Flux2PosEmbed,
    Flux2SingleTransformerBlock,
    Flux2SwiGLU,
    Flux2TimestepGuidanceEmbeddings,
    Flux2TransformerBlock,
)

from distriray.parallel.layers.tokens import PatchJointAttention, PatchTokenAttention
from distriray.parallel.networks.families.flux import CUTS, POSITIONS
from distriray.parallel.networks.plan import OF_TWO_KINDS, Attention, Input, Plan
from distriray.parallel.networks.tokens import TokenNetwork


class PatchFlux2Attention(PatchJointAttention, Flux2AttnProcessor):
    """Attention of FLUX.2, in its blocks of two streams."""


class PatchFlux2SingleAttention(PatchTokenAttention, Flux2ParallelSelfAttnProcessor):
    """Attention of FLUX.2 in its blocks of one stream: one projection gives the feed-forward's input too."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> torch.Tensor:
        if not self.context.exchanges:
            own: torch.Tensor = super().__call__(attn, hidden_states, attention_mask, image_rotary_emb)
            return own
        self.check(attention_mask)
        sizes = [attn.inner_dim] * 3 + [attn.mlp_hidden_dim * attn.mlp_mult_factor]
        *projected, forward = attn.to_qkv_mlp_proj(hidden_states).split(sizes, -1)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in projected)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        attended = self.attend(query, key, value)
        output: torch.Tensor = attn.to_out(torch.cat((attended, attn.mlp_act_fn(forward)), -1))
        return output


class Flux2(TokenNetwork):
    """A `Flux2Transformer2DModel`: a token is what its pipeline has made of 2x2 latents of the VAE."""

    kind = Flux2Transformer2DModel
    row_unit = 1
    plan = Plan(
        cuts=CUTS,
        attention={
            "transformer_blocks.*.attn": Attention(Flux2AttnProcessor, PatchFlux2Attention),
            "single_transformer_blocks.*.attn": Attention(
                Flux2ParallelSelfAttnProcessor, PatchFlux2SingleAttention
            ),
        },
        inputs={
            "guidance": Input("embedded guidance scale"),
            **POSITIONS,
        },
        blocks=OF_TWO_KINDS,
    )
    layers = frozenset[type](
        {
            Flux2Attention,
            Flux2FeedForward,
            Flux2Modulation,
            Flux2ParallelSelfAttention,
            Flux2PosEmbed,
            Flux2SingleTransformerBlock,
            Flux2SwiGLU,
            Flux2TimestepGuidanceEmbeddings,
            Flux2TransformerBlock,
        }
    )
