"""Stable Diffusion 3 and 3.5: `SD3Transformer2DModel`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import Attention as AttentionLayer
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.normalization import SD35AdaLayerNormZeroX
from diffusers.models.transformers.transformer_sd3 import SD3SingleTransformerBlock

from distriray.errors import UnsupportedModel
from distriray.parallel.layers.tokens import PatchJointAttention, Tokens
from distriray.parallel.networks.controls import UsedControl, check_same
from distriray.parallel.networks.local import LocalCode
from distriray.parallel.networks.plan import Attention, Blocks, Input, Plan
from distriray.parallel.networks.token_control import Added, TokenControl
from distriray.parallel.networks.tokens import TokenNetwork


class PatchSD3Attention(PatchJointAttention, JointAttnProcessor2_0):
    """Attention of Stable Diffusion 3, without rotary embeddings."""

    text_first = False


ATTENTION = {
    "transformer_blocks.*.attn": Attention(JointAttnProcessor2_0, PatchSD3Attention),
    "transformer_blocks.*.attn2": Attention(JointAttnProcessor2_0, PatchSD3Attention, "image"),
}
LAYERS = frozenset[type]({AttentionLayer, JointTransformerBlock, SD35AdaLayerNormZeroX})


class SD3Control(TokenControl):
    """An `SD3ControlNetModel`, whose picture is given as latents; some see no text."""

    kind = SD3ControlNetModel
    plan = Plan(
        cuts={
            "pos_embed": {0: ("image", 1)},
            "pos_embed_input": {0: ("image", 1)},
            "context_embedder": {0: ("text", 1)},
        },
        attention=ATTENTION,
        inputs={},
        whole=("pos_embed", "pos_embed_input"),
    )
    layers = LAYERS | {SD3SingleTransformerBlock}
    like = ("patch_size", "in_channels", "num_attention_heads", "attention_head_dim", "pooled_projection_dim")

    def __init__(self, module: Any, local: LocalCode | None = None, tokens: Tokens | None = None) -> None:
        if module.context_embedder is None:
            (alone, attention), *_ = ATTENTION.items()
            self.plan = replace(type(self).plan, attention={alone: replace(attention, sequence="image")})
        super().__init__(module, local, tokens)

    @classmethod
    def check_fits(cls, network: Any, transformer: Any) -> None:
        super().check_fits(network, transformer)
        own, its = network.config, transformer.config
        if own.extra_conditioning_channels:
            raise UnsupportedModel("it takes a mask beside its picture, by extra_conditioning_channels")
        if own.joint_attention_dim is not None:
            for name in ("joint_attention_dim", "caption_projection_dim"):
                check_same(name, own[name], its[name])

    @staticmethod
    def arguments(control: UsedControl, given: Mapping[str, Any]) -> dict[str, Any]:
        pooled = given["pooled_projections"]
        return {
            "hidden_states": given["hidden_states"],
            "timestep": given["timestep"],
            "encoder_hidden_states": None
            if control.network.context_embedder is None
            else given["encoder_hidden_states"],
            "pooled_projections": torch.zeros_like(pooled)
            if control.network.config.force_zeros_for_pooled_projection
            else pooled,
        }

    @staticmethod
    def spread(network: Any, transformer: Any, output: Any) -> dict[str, Added]:
        (samples,) = output
        blocks = len(transformer.transformer_blocks)
        each = blocks / len(samples)  # of a fraction of blocks too
        return {
            "block_controlnet_hidden_states": {index: samples[int(index / each)] for index in range(blocks)}
        }


class SD3(TokenNetwork):
    """An `SD3Transformer2DModel`: its first layer sees all latents, by whose size it crops positions."""

    kind = SD3Transformer2DModel
    repeats = ("JointTransformerBlock",)
    control = SD3Control
    plan = Plan(
        cuts={"pos_embed": {0: ("image", 1)}, "context_embedder": {0: ("text", 1)}},
        attention=ATTENTION,
        inputs={"pooled_projections": Input("pooled prompt embeddings", "near")},
        whole=("pos_embed",),
        residuals=("block_controlnet_hidden_states",),
        blocks=Blocks(),
    )
    layers = LAYERS
