"""Ovis-Image: `OvisImageTransformer2DModel`."""

from __future__ import annotations

from diffusers import OvisImageTransformer2DModel
from diffusers.models.activations import SwiGLU
from diffusers.models.normalization import AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_ovis_image import (
    OvisImageAttention,
    OvisImageAttnProcessor,
    OvisImagePosEmbed,
    OvisImageSingleTransformerBlock,
    OvisImageTransformerBlock,
)

from distriray.parallel.layers.tokens import PatchJointAttention
from distriray.parallel.networks.families.flux import CUTS, POSITIONS
from distriray.parallel.networks.plan import OF_TWO_KINDS, Attention, Plan
from distriray.parallel.networks.tokens import TokenNetwork


class PatchOvisImageAttention(PatchJointAttention, OvisImageAttnProcessor):
    """Attention of Ovis-Image, in its blocks of both kinds."""


class OvisImage(TokenNetwork):
    """An `OvisImageTransformer2DModel`: FLUX.1's layout, conditioned by text and time alone."""

    kind = OvisImageTransformer2DModel
    row_unit = 2
    plan = Plan(
        cuts=CUTS,
        attention={
            "transformer_blocks.*.attn": Attention(OvisImageAttnProcessor, PatchOvisImageAttention),
            "single_transformer_blocks.*.attn": Attention(OvisImageAttnProcessor, PatchOvisImageAttention),
        },
        inputs=dict(POSITIONS),
        blocks=OF_TWO_KINDS,
    )
    layers = frozenset[type](
        {
            OvisImageAttention,
            OvisImagePosEmbed,
            OvisImageSingleTransformerBlock,
            OvisImageTransformerBlock,
            AdaLayerNormZeroSingle,
            SwiGLU,
        }
    )
