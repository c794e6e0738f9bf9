"""Stable Diffusion 3 and 3.5: `SD3Transformer2DModel`."""

from __future__ import annotations

from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import Attention as AttentionLayer
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.normalization import SD35AdaLayerNormZeroX

from distriray.parallel.layers.tokens import PatchJointAttention
from distriray.parallel.networks.plan import Attention, Input, Plan
from distriray.parallel.networks.tokens import TokenNetwork


class PatchSD3Attention(PatchJointAttention, JointAttnProcessor2_0):
    """Attention of Stable Diffusion 3, without rotary embeddings."""

    text_first = False


class SD3(TokenNetwork):
    """An `SD3Transformer2DModel`: its first layer sees all latents, by whose size it crops positions."""

    kind = SD3Transformer2DModel
    repeats = ("JointTransformerBlock",)
    plan = Plan(
        cuts={"pos_embed": {0: ("image", 1)}, "context_embedder": {0: ("text", 1)}},
        attention={
            "transformer_blocks.*.attn": Attention(JointAttnProcessor2_0, PatchSD3Attention),
            "transformer_blocks.*.attn2": Attention(JointAttnProcessor2_0, PatchSD3Attention, "image"),
        },
        inputs={"pooled_projections": Input("pooled prompt embeddings", "near")},
        whole=("pos_embed",),
    )
    layers = frozenset[type]({AttentionLayer, JointTransformerBlock, SD35AdaLayerNormZeroX})
