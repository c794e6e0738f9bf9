"""PixArt-alpha and -sigma: `PixArtTransformer2DModel`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention as AttentionLayer
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.embeddings import PixArtAlphaCombinedTimestepSizeEmbeddings
from diffusers.models.normalization import AdaLayerNormSingle

from distriray.parallel.context import PatchContext
from distriray.parallel.layers.attention import (
    CachedCrossAttention,
    PatchSelfAttention,
    check_plain_attention,
)
from distriray.parallel.layers.tokens import Sequence, Tokens
from distriray.parallel.networks.plan import Attention, Input, Plan
from distriray.parallel.networks.tokens import TokenNetwork


class PatchImageAttention(PatchSelfAttention):
    """That of transformers whose image attends to itself as in a U-Net."""

    def __init__(self, context: PatchContext, tokens: Tokens, sequence: Sequence) -> None:
        super().__init__(context)
        self.tokens = tokens
        self.sequence = sequence

    def exchanged(self, *inputs: Any) -> torch.Tensor:
        step, tokens = self.step, self.tokens.of(self.sequence)
        self.tokens.entered[self] += 1
        if step is None or not (self.tokens.deals_heads and step.mix.fresh_keys_values):
            return super().exchanged(*inputs)
        own, _, *sources = inputs
        projected = [own, *(x.unflatten(-1, own.shape[2:]) for x in sources)]
        query, key, value = (x.transpose(1, 2) for x in step.deal_heads(projected, tokens))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return step.deal_tokens(attended, tokens)


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
    )
    layers = frozenset[type](
        {AttentionLayer, BasicTransformerBlock, AdaLayerNormSingle, PixArtAlphaCombinedTimestepSizeEmbeddings}
    )

    def check(self) -> None:
        super().check()
        for name, attention, _ in self._attentions():
            check_plain_attention(name, attention)
