"""Chroma: `ChromaTransformer2DModel`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ChromaTransformer2DModel
from diffusers.models.transformers.transformer_chroma import (
    ChromaAdaLayerNormContinuousPruned,
    ChromaAdaLayerNormZeroPruned,
    ChromaAdaLayerNormZeroSinglePruned,
    ChromaApproximator,
    ChromaCombinedTimestepTextProjEmbeddings,
    ChromaSingleTransformerBlock,
    ChromaTransformerBlock,
)
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor, FluxPosEmbed
from torch import nn

from distriray.errors import InvalidRequest
from distriray.parallel.networks.families.flux import CUTS, POSITIONS, PatchFluxAttention
from distriray.parallel.networks.plan import OF_TWO_KINDS, Attention, Input, Plan, of_all_ranks
from distriray.parallel.networks.tokens import TokenNetwork
from distriray.parallel.partition import TokenPartition


class PatchChromaAttention(PatchFluxAttention):
    """Attention of Chroma, where one mask is of the queries as well as of the keys."""

    def mask(self, queries: int) -> torch.Tensor | None:
        keys, step = self.tokens.key_mask, self.context.step
        if keys is None:
            return None
        assert step is not None
        own = keys.transpose(2, 3)
        if queries < own.shape[2]:
            own = own.split(self.tokens.of(self.sequence), 2)[step.rank]
        return own * keys  # as in the network's blocks; a pipeline's are numbers that are added to scores


class Chroma(TokenNetwork):
    """A `ChromaTransformer2DModel`: near FLUX.1, but with a mask over text and image."""

    kind = ChromaTransformer2DModel
    row_unit = 2
    plan = Plan(
        cuts=CUTS,
        attention={
            "transformer_blocks.*.attn": Attention(FluxAttnProcessor, PatchChromaAttention),
            "single_transformer_blocks.*.attn": Attention(FluxAttnProcessor, PatchChromaAttention),
        },
        inputs={"attention_mask": Input("mask of the text's and the image's tokens"), **POSITIONS},
        blocks=OF_TWO_KINDS,
    )
    layers = frozenset[type](
        {
            FluxAttention,
            FluxPosEmbed,
            ChromaAdaLayerNormContinuousPruned,
            ChromaAdaLayerNormZeroPruned,
            ChromaAdaLayerNormZeroSinglePruned,
            ChromaApproximator,
            ChromaCombinedTimestepTextProjEmbeddings,
            ChromaSingleTransformerBlock,
            ChromaTransformerBlock,
        }
    )

    def _compute(self, **arguments: Any) -> Any:
        device = arguments["timestep"].device

        def on_device(module: nn.Module, args: Any) -> torch.Tensor:
            """Zeros, which the network makes on the host; their embedding would be copied, and stop a GPU."""
            return torch.zeros(args[0].shape, dtype=args[0].dtype, device=device)

        with self.module.time_text_embed.guidance_proj.register_forward_pre_hook(on_device):
            return super()._compute(**arguments)

    def take_mask(self, arguments: dict[str, Any], partition: TokenPartition) -> torch.Tensor | None:
        if partition.world_size == 1 or arguments["attention_mask"] is None:
            return None
        mask = arguments.pop("attention_mask")
        text, image = partition.text, partition.height
        if mask.shape[1] != text + image:
            raise InvalidRequest(
                f"attention_mask of {mask.shape[1]} tokens, where text and image have {text + image}"
            )
        return of_all_ranks(mask[:, :text], mask[:, text:], partition)
