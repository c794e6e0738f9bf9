"""PixArt-alpha and -sigma: `PixArtTransformer2DModel`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention as AttentionLayer
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.embeddings import PixArtAlphaCombinedTimestepSizeEmbeddings
from diffusers.models.normalization import AdaLayerNormSingle

from distriray.errors import UnsupportedModel
from distriray.parallel.layers.attention import CachedCrossAttention, check_plain_attention
from distriray.parallel.layers.tokens import PatchTokenAttention, output_of, projections_of
from distriray.parallel.networks.plan import Attention, Blocks, Input, Plan
from distriray.parallel.networks.tokens import TokenNetwork


class PatchImageAttention(PatchTokenAttention, AttnProcessor2_0):
    """Attention of PixArt, whose image attends to itself as in a U-Net."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not self.context.exchanges:
            own: torch.Tensor = super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb
            )
            return own
        self.check(attention_mask)
        if encoder_hidden_states is not None or temb is not None:
            raise UnsupportedModel("self-attention that is given other tokens, or a temb")
        query, key, value = projections_of(attn, hidden_states, ("to_q", "to_k", "to_v"), ())
        return output_of(attn, self.attend(query, key, value))


class PixArt(TokenNetwork):
    """A `PixArtTransformer2DModel`: its image attends to itself, and to text that every rank has."""

    kind = PixArtTransformer2DModel
    repeats = ("BasicTransformerBlock",)
    plan = Plan(
        cuts={"pos_embed": {0: ("image", 1)}},
        attention={
            "transformer_blocks.*.attn1": Attention(AttnProcessor2_0, PatchImageAttention, "image"),
            "transformer_blocks.*.attn2": Attention(AttnProcessor2_0, CachedCrossAttention, None),
        },
        inputs={
            "added_cond_kwargs": Input("size conditions"),
            "encoder_attention_mask": Input("text mask"),
        },
        kwargs="cross_attention_kwargs",
        whole=("pos_embed",),
        blocks=Blocks(),
    )
    layers = frozenset[type](
        {AttentionLayer, BasicTransformerBlock, AdaLayerNormSingle, PixArtAlphaCombinedTimestepSizeEmbeddings}
    )

    def check(self) -> None:
        super().check()
        for name, attention, _ in self._attentions():
            check_plain_attention(name, attention)
