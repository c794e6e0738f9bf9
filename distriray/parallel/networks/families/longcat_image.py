"""LongCat-Image: `LongCatImageTransformer2DModel`."""

from __future__ import annotations

from diffusers import LongCatImageTransformer2DModel
from diffusers.models.normalization import AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_longcat_image import (
    LongCatImageAttention,
    LongCatImageAttnProcessor,
    LongCatImagePosEmbed,
    LongCatImageSingleTransformerBlock,
    LongCatImageTimestepEmbeddings,
    LongCatImageTransformerBlock,
)

from distriray.parallel.layers.tokens import PatchJointAttention
from distriray.parallel.networks.families.flux import CUTS, POSITIONS
from distriray.parallel.networks.plan import OF_TWO_KINDS, Attention, Input, Plan
from distriray.parallel.networks.tokens import TokenNetwork


class PatchLongCatImageAttention(PatchJointAttention, LongCatImageAttnProcessor):
    """Attention of LongCat-Image, in its blocks of both kinds."""


class LongCatImage(TokenNetwork):
    """A `LongCatImageTransformer2DModel`: FLUX.1's layout, without pooled embeddings."""

    kind = LongCatImageTransformer2DModel
    row_unit = 2
    plan = Plan(
        cuts=CUTS,
        attention={
            "transformer_blocks.*.attn": Attention(LongCatImageAttnProcessor, PatchLongCatImageAttention),
            "single_transformer_blocks.*.attn": Attention(
                LongCatImageAttnProcessor, PatchLongCatImageAttention
            ),
        },
        inputs={"guidance": Input("embedded guidance scale"), **POSITIONS},
        kwargs=None,
        blocks=OF_TWO_KINDS,
    )
    layers = frozenset[type](
        {
            LongCatImageAttention,
            LongCatImagePosEmbed,
            LongCatImageSingleTransformerBlock,
            LongCatImageTimestepEmbeddings,
            LongCatImageTransformerBlock,
            AdaLayerNormZeroSingle,
        }
    )
