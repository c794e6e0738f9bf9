"""FLUX.3: `Flux3Transformer2DModel`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import Flux3Transformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux3 import (
    Flux3AdaLayerNorm,
    Flux3Attention,
    Flux3AttnProcessor,
    Flux3FeedForward,
    Flux3ModeTransformerBlock,
    Flux3Modulation,
    Flux3PosEmbed,
    Flux3SingleTransformerBlock,
    Flux3SwiGLU,
)

from distriray.parallel.agreement import Compared
from distriray.parallel.layers.tokens import PatchTokenAttention, output_of
from distriray.parallel.networks.base import Call
from distriray.parallel.networks.families.flux import CUTS, POSITIONS
from distriray.parallel.networks.plan import Attention, Blocks, Input, Plan
from distriray.parallel.networks.tokens import TokenNetwork
from distriray.parallel.partition import TokenPartition


class PatchFlux3Attention(PatchTokenAttention, Flux3AttnProcessor):
    """Attention of FLUX.3, in its blocks of both kinds: queries and keys are normed and turned in float32."""

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
        query, key, value = (
            projection(hidden_states).unflatten(-1, (attn.heads, -1))
            for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query.float()), attn.norm_k(key.float())
        if image_rotary_emb is not None and query.shape[1]:  # a text may be of fewer tokens than ranks
            query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        return output_of(attn, self.attend(query.to(value.dtype), key.to(value.dtype), value))


class Flux3(TokenNetwork):
    """A `Flux3Transformer2DModel`: a token is what its pipeline has made of 2x2 latents of the VAE.

    Image, text and the pictures that it refers to are a stream each, with blocks of its own before those that
    all three share. All are cut where the network gets them, so that a rank has some tokens of each from the
    first block on. Every rank could instead compute the text's own blocks (5, before 28 that are shared)
    whole, which saves a wait and the text's keys and values in each. But beside an image of 4096 tokens, 8
    ranks would compute 2% more in a step for 80 tokens of text, 12% for 512, and a caption of its prompt
    upsampler has up to 3584; and rotation and modulation, which are made once for blocks of both kinds, would
    have to be cut between them.
    """

    kind = Flux3Transformer2DModel
    pads_text = False
    row_unit = 1
    plan = Plan(
        cuts={
            "": {
                **CUTS[""],
                "image_cond_hidden_states": ("references", 1),
                "image_cond_ids": ("references", -2),
            }
        },
        attention={
            "txt_mode_blocks.*.attn": Attention(Flux3AttnProcessor, PatchFlux3Attention, "text"),
            "mode_blocks.image.*.attn": Attention(Flux3AttnProcessor, PatchFlux3Attention, "image"),
            "mode_blocks.image_cond.*.attn": Attention(Flux3AttnProcessor, PatchFlux3Attention, "references"),
            "single_transformer_blocks.*.attn": Attention(Flux3AttnProcessor, PatchFlux3Attention),
        },
        inputs={
            **POSITIONS,
            "image_cond_hidden_states": Input("reference images", "near"),
            "image_cond_ids": Input("positions of the reference images' tokens", batched=False),
            "target_timestep": Input("timesteps that the step goes to"),
        },
        kwargs="attention_kwargs",
        blocks=Blocks(
            "mode_blocks.image.0", ("txt_mode_blocks", "mode_blocks.image_cond", "single_transformer_blocks")
        ),
    )
    layers = frozenset[type](
        {
            Flux3AdaLayerNorm,
            Flux3Attention,
            Flux3FeedForward,
            Flux3ModeTransformerBlock,
            Flux3Modulation,
            Flux3PosEmbed,
            Flux3SingleTransformerBlock,
            Flux3SwiGLU,
        }
    )

    def partition(self, call: Call, patches: int) -> TokenPartition:
        return replace(super().partition(call, patches), references=_reference_tokens(call))

    def compared(self, call: Call) -> Compared:
        return super().compared(call).plus(numbers={"tokens of reference images": _reference_tokens(call)})


def _reference_tokens(call: Call) -> int:
    references = call.arguments["image_cond_hidden_states"]
    return 0 if references is None else references.shape[1]
