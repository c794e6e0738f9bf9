"""ERNIE-Image: `ErnieImageTransformer2DModel`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ErnieImageTransformer2DModel
from diffusers.models.transformers.transformer_ernie_image import (
    ErnieImageAdaLNContinuous,
    ErnieImageAttention,
    ErnieImageEmbedND3,
    ErnieImageFeedForward,
    ErnieImageSharedAdaLNBlock,
    ErnieImageSingleStreamAttnProcessor,
    ErnieImageTransformer2DModelOutput,
)
from torch import nn

from distriray.errors import InvalidRequest
from distriray.parallel.layers.tokens import PatchTokenAttention, projections_of
from distriray.parallel.networks.base import Call, Collect
from distriray.parallel.networks.local import LocalCode
from distriray.parallel.networks.plan import Attention, Blocks, Cutter, Input, Plan, of_all_ranks
from distriray.parallel.networks.tokens import TokenNetwork
from distriray.parallel.partition import TokenPartition
from distriray.parallel.share import Share


class PatchErnieImageAttention(PatchTokenAttention, ErnieImageSingleStreamAttnProcessor):
    """Attention of ERNIE-Image: one stream, the image's tokens first, rotated in halves of a head."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not self.context.exchanges:
            if attention_mask is not None:  # the network makes it for the whole image, whose tokens are first
                attention_mask = attention_mask[..., -hidden_states.shape[1] :]
            own: torch.Tensor = super().__call__(attn, hidden_states, attention_mask, freqs_cis)
            return own
        query, key, value = projections_of(
            attn, hidden_states, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")
        )
        if freqs_cis is not None:
            query, key = (_rotated(x, freqs_cis) for x in (query, key))
        output: torch.Tensor = attn.to_out[0](self.attend(query, key, value))
        return output


class ErnieImage(TokenNetwork):
    """An `ErnieImageTransformer2DModel`, called with texts padded to the longest and the length of each.

    Tokens lie along the first dimension between its blocks, those of the image before those of the text.
    The network makes modulation for as many tokens as it has, which are this rank's, but positions and masks
    by the size of the image: positions are cut, and counted on from the tokens of the text before.
    """

    kind = ErnieImageTransformer2DModel
    pads_text = False
    names = ("hidden_states", "timestep", "text_bth")
    plan = Plan(
        cuts={"x_embedder": {0: ("image", 1)}, "text_proj": {0: ("text", 1)}},
        attention={
            "layers.*.self_attention": Attention(
                ErnieImageSingleStreamAttnProcessor, PatchErnieImageAttention
            )
        },
        inputs={"text_lens": Input("tokens of each text")},
        gather="final_linear",
        kwargs=None,
        whole=("x_embedder",),
        blocks=Blocks("layers.0", after="final_norm"),
    )
    layers = frozenset[type](
        {
            ErnieImageAdaLNContinuous,
            ErnieImageAttention,
            ErnieImageEmbedND3,
            ErnieImageFeedForward,
            ErnieImageSharedAdaLNBlock,
        }
    )

    def __init__(self, module: Any, local: LocalCode | None = None) -> None:
        self._whole: list[torch.Tensor] = []
        super().__init__(module, local)

    def read(self, *args: Any, **kwargs: Any) -> Call:
        call = super().read(*args, **kwargs)
        lengths, patch, sides = call.arguments["text_lens"], self.row_unit, tuple(call.sample.shape[2:])
        if tuple(lengths.shape) != (call.batch,) or len(call.text) != call.batch:
            raise InvalidRequest(
                f"text_bth of {len(call.text)} texts and text_lens of shape {tuple(lengths.shape)}, where "
                f"there are {call.batch} images; give each its text and a length"
            )
        if any(side % patch for side in sides):
            raise InvalidRequest(f"latents of {sides}, which are no multiples of the patch size {patch}")
        return call

    def take_mask(self, arguments: dict[str, Any], partition: TokenPartition) -> torch.Tensor | None:
        lengths = arguments["text_lens"]
        text = torch.arange(partition.text, device=lengths.device) < lengths[:, None]
        image = text.new_ones((len(text), partition.height))
        arguments["text_lens"] = lengths - self._before(partition)
        return of_all_ranks(text, image, partition, text_first=False)

    def _before(self, partition: TokenPartition) -> int:
        """Tokens of the text before this rank's."""
        return partition.tokens("text", self._shared[0].communicator.rank)[0]

    def compute(self, call: Call, share: Share, collect: Collect) -> Any:
        tokens: torch.Tensor = super().compute(call, share, collect)
        patch, (rows, columns) = self.row_unit, call.sample.shape[2:]
        sample = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (rows // patch, columns // patch))
        sample = sample.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, rows, columns)
        if call.arguments["return_dict"]:
            return ErnieImageTransformer2DModelOutput(sample=sample)
        return (sample,)

    def _compute(self, **arguments: Any) -> torch.Tensor:
        """The predicted tokens of all ranks and of the whole batch: the forward shapes its own part alone."""
        share, _ = self._shared
        partition, rank = share.tokens, share.communicator.rank
        if self.module.text_proj is None:
            arguments = Cutter(partition, rank).cut({"text_bth": ("text", 1)}, arguments)
        image, before = slice(*partition.rows(rank)), self._before(partition)

        def own(module: nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
            """Positions of this rank's tokens, of those that were made for the whole image."""
            of_image, of_text = args[0].tensor_split([partition.height], 1)
            ids = torch.cat([of_image[:, image], of_text], 1)
            return torch.cat([ids[..., :1] + before, ids[..., 1:]], 2)

        with self.module.pos_embed.register_forward_pre_hook(own):
            super()._compute(**arguments)
        return self._whole.pop()

    def _gather(
        self, collect: Collect, exchanges: bool, module: nn.Module, inputs: Any, output: torch.Tensor
    ) -> torch.Tensor:
        share, _ = self._shared
        own = share.partition.counts(0)[share.communicator.rank]
        whole = super()._gather(collect, exchanges, module, inputs, output[:own].transpose(0, 1))
        self._whole.append(whole)
        return whole[share.part].transpose(0, 1)


def _rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Queries or keys, (batch, own tokens, heads, channels of a head), turned by their position."""
    turned, left = x.tensor_split([angles.shape[-1]], -1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, left], -1)
