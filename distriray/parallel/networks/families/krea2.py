"""Krea 2: `Krea2Transformer2DModel`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Krea2Transformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_krea2 import (
    Krea2Attention,
    Krea2AttnProcessor,
    Krea2FinalLayer,
    Krea2RMSNorm,
    Krea2RotaryPosEmbed,
    Krea2SwiGLU,
    Krea2TextProjection,
    Krea2TimestepEmbedding,
    Krea2TransformerBlock,
)
from torch import nn

from distriray.errors import UnsupportedModel
from distriray.parallel.layers.tokens import PatchTokenAttention
from distriray.parallel.networks.plan import Attention, Blocks, Input, Plan
from distriray.parallel.networks.tokens import Heads, TokenNetwork


class PatchKrea2Attention(PatchTokenAttention, Krea2AttnProcessor):
    """Attention of Krea 2: one stream, with a gate, and keys and values of some of the heads."""

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
        if attention_mask is not None and self.tokens.key_mask is None:
            raise UnsupportedModel("attention that is given a mask, where the network was given none")
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, attn.head_dim))
            for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        attended = self.attend(query, key, value) * torch.sigmoid(attn.to_gate(hidden_states))
        output: torch.Tensor = attn.to_out[0](attended)
        return output

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        shared = query.shape[2] // key.shape[2]
        key, value = (x.repeat_interleave(shared, 2) for x in (key, value))
        return super()._attend(query, key, value)


class Krea2(TokenNetwork):
    """A `Krea2Transformer2DModel`: its pipeline packs 2x2 latents into a token, and masks padded text.

    Every rank refines the whole of the text, and goes on with some tokens of it where they join the image.
    """

    kind = Krea2Transformer2DModel
    row_unit = 2
    plan = Plan(
        cuts={
            "": {
                "hidden_states": ("image", 1),
                "encoder_hidden_states": ("text", 1),
                "encoder_attention_mask": ("text", 1),
                "position_ids": ("joint", 0),
            },
            "text_fusion": {0: ("text", 1)},
        },
        attention={"transformer_blocks.*.attn": Attention(Krea2AttnProcessor, PatchKrea2Attention)},
        inputs={
            "position_ids": Input("positions of the tokens", batched=False),
            "encoder_attention_mask": Input("text mask"),
        },
        gather="final_layer",
        kwargs="attention_kwargs",
        whole=("text_fusion",),
        mask="encoder_attention_mask",
        blocks=Blocks(after="final_layer"),
    )
    layers = frozenset[type](
        {
            Krea2Attention,
            Krea2FinalLayer,
            Krea2RMSNorm,
            Krea2RotaryPosEmbed,
            Krea2SwiGLU,
            Krea2TextProjection,
            Krea2TimestepEmbedding,
            Krea2TransformerBlock,
        }
    )

    def heads(self, attention: Any) -> Heads:
        return Heads(attention.num_heads, attention.num_kv_heads, attention.head_dim)

    def _compute(self, **arguments: Any) -> Any:
        states, mask = arguments["encoder_hidden_states"], arguments["encoder_attention_mask"]

        def whole(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return (states,), {"attention_mask": None if mask is None else mask[:, None, None]}

        with self.module.text_fusion.register_forward_pre_hook(whole, with_kwargs=True):
            return super()._compute(**arguments)
