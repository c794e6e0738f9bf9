"""Z-Image: `ZImageTransformer2DModel`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.attention_processor import Attention as AttentionLayer
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_z_image import (
    SEQ_MULTI_OF,
    FeedForward,
    FinalLayer,
    TimestepEmbedder,
    ZImageTransformerBlock,
    ZSingleStreamAttnProcessor,
)
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from distriray.errors import UnsupportedModel
from distriray.parallel.agreement import Compared
from distriray.parallel.layers.tokens import PatchTokenAttention, Tokens, output_of, projections_of
from distriray.parallel.networks.base import Call, Collect
from distriray.parallel.networks.local import LocalCode
from distriray.parallel.networks.plan import Attention, Plan, of_all_ranks
from distriray.parallel.networks.tokens import TokenNetwork
from distriray.parallel.partition import TokenPartition
from distriray.parallel.share import Share

PATCH = 2
"""Latent rows and columns of a token."""


class PatchZImageAttention(PatchTokenAttention, ZSingleStreamAttnProcessor):
    """Attention of Z-Image: one stream, rotated by complex numbers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not self.context.exchanges:
            own: torch.Tensor = super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis
            )
            return own
        query, key, value = projections_of(
            attn, hidden_states, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")
        )
        if freqs_cis is not None:
            query, key = (_rotated(x, freqs_cis) for x in (query, key))
        return output_of(attn, self.attend(query, key, value))


class ZImage(TokenNetwork):
    """A `ZImageTransformer2DModel`, called with a list of images and one of texts, of any lengths.

    Image and texts are padded to multiples of 32 tokens, and padding is attended to; what makes the texts of
    a batch equally long is not. A rank has some tokens of the image from the first block on, and of the
    texts where they join it: before that every rank refines the whole of them.
    """

    kind = ZImageTransformer2DModel
    pads_text = False
    names = ("x", "t", "cap_feats")
    row_unit = PATCH
    plan = Plan(
        cuts={},
        attention={
            "noise_refiner.*.attention": Attention(ZSingleStreamAttnProcessor, PatchZImageAttention, "image"),
            "context_refiner.*.attention": Attention(ZSingleStreamAttnProcessor, None, None),
            "layers.*.attention": Attention(ZSingleStreamAttnProcessor, PatchZImageAttention),
        },
        inputs={},
        whole=("context_refiner", "cap_embedder"),
    )
    layers = frozenset[type](
        {AttentionLayer, FeedForward, FinalLayer, TimestepEmbedder, ZImageTransformerBlock, nn.ModuleDict}
    )

    def __init__(self, module: Any, local: LocalCode | None = None) -> None:
        self._text: tuple[list[tuple[torch.Tensor, int | None]], torch.Tensor] | None = None
        super().__init__(module, local)

    def check(self) -> None:
        super().check()
        if self.module.siglip_embedder is not None:
            raise UnsupportedModel("a ZImageTransformer2DModel with siglip_feat_dim, of editing")
        if PATCH not in self.module.all_patch_size or not (self.module.noise_refiner and self.module.layers):
            raise UnsupportedModel(
                f"a ZImageTransformer2DModel without patches of {PATCH}, or without layers"
            )

    def sample_of(self, latents: Any) -> torch.Tensor:
        if not all(isinstance(image, torch.Tensor) for image in latents):
            raise UnsupportedModel("a call with several pictures for an image, of editing")
        shapes = {image.shape for image in latents}
        if len(shapes) > 1 or next(iter(shapes))[1] != 1:
            raise UnsupportedModel(f"images of {sorted(map(tuple, shapes))} in one call; give equal ones")
        return torch.stack(list(latents))[:, :, 0]

    def text_of(self, text: Any) -> torch.Tensor:
        """Texts padded to the longest; of the same tensors as last time, the same tensor."""
        known = [(each, None if each.is_inference() else each._version) for each in text]
        if self._text is None or not _same(self._text[0], known):
            self._text = known, pad_sequence(list(text), batch_first=True)
        return self._text[1]

    def image_tokens(self, sample: torch.Tensor) -> int:
        return _padded(super().image_tokens(sample))

    def partition(self, call: Call, patches: int) -> TokenPartition:
        return TokenPartition.of(self.image_tokens(call.sample), _padded(call.text.shape[1]), patches)

    def cached(self, call: Call) -> Any:
        return self.module.rope_embedder.freqs_cis

    def compared(self, call: Call) -> Compared:
        compared = super().compared(call)
        lengths = [len(text) for text in call.arguments["cap_feats"]]
        return compared._replace(texts={**compared.texts, "tokens of each text": repr(lengths)})

    def compute(self, call: Call, share: Share, collect: Collect) -> Any:
        given, self._shared = dict(call.arguments), (share, collect)
        arguments = {
            **given,
            "x": given["x"][share.part],
            "t": share.cut(given["t"]),
            "cap_feats": given["cap_feats"][share.part],
            "return_dict": False,
        }
        whole = self.forward(**arguments)
        sizes = [tuple(image.shape[1:]) for image in given["x"]]
        images = self.module.unpatchify(list(whole.unbind()), sizes, PATCH, 1)
        return Transformer2DModelOutput(sample=images) if given["return_dict"] else (images,)

    def _compute(self, **arguments: Any) -> torch.Tensor:
        """The predicted tokens of all ranks and of the whole batch."""
        share, collect = self._shared
        partition = share.partition
        assert isinstance(partition, TokenPartition) and self.replaced is not None
        self._tokens.begin(partition, None)
        cutter = _Cutter(partition, share.communicator.rank, self._tokens)
        final, whole = self.module.all_final_layer[f"{PATCH}-1"], []

        def gather(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            whole.append(self._gather(collect, share.exchanges, module, inputs, output[:, : cutter.own]))
            return whole[0][share.part]

        with ExitStack() as hooks:
            for blocks, cut in (
                (self.module.noise_refiner, cutter.image),
                (self.module.layers, cutter.joint),
            ):
                for index, block in enumerate(blocks):
                    before = partial(_cut_before, partial(cut, first=index == 0))
                    hooks.enter_context(block.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(final.register_forward_hook(gather))
            self.replaced(**arguments)
        return whole[0]


class _Cutter:
    """Cuts what goes into blocks, by the names of their parameters, to the tokens of one rank.

    Attributes:
        own: the image's tokens of this rank.
    """

    def __init__(self, partition: TokenPartition, rank: int, tokens: Tokens) -> None:
        self._partition, self._tokens = partition, tokens
        self._image, self._text = slice(*partition.rows(rank)), slice(*partition.tokens("text", rank))
        self.own = self._image.stop - self._image.start

    def image(self, given: Mapping[str, Any], first: bool) -> dict[str, Any]:
        """Into a block over the image alone: x and freqs_cis, (batch, tokens, channels)."""
        if given["attn_mask"] is not None:
            raise UnsupportedModel("images of different sizes in one call")
        cut = {"freqs_cis": given["freqs_cis"][:, self._image]}
        return {**cut, "x": given["x"][:, self._image]} if first else cut

    def joint(self, given: Mapping[str, Any], first: bool) -> dict[str, Any]:
        """Into a block over image and text. The first one's x has this rank's image, and all of the text."""
        image, mask = self._partition.height, given["attn_mask"]
        cut = {"freqs_cis": self._joined(given["freqs_cis"], image), "attn_mask": None}
        text = given["freqs_cis"].shape[1] - image
        if mask is not None or text < self._partition.text:
            if mask is None:
                mask = given["freqs_cis"].new_ones(given["freqs_cis"].shape[:2], dtype=torch.bool)
            cut["attn_mask"] = self._joined(mask, image)
            if self._tokens.key_mask is None:
                self._tokens.key_mask = self._key_mask(mask[:, image:])
        return {**cut, "x": self._joined(given["x"], self.own, slice(None))} if first else cut

    def _joined(self, whole: torch.Tensor, image: int, of_image: slice | None = None) -> torch.Tensor:
        """This rank's part of (batch, tokens of the image and of the longest text here, ...)."""
        missing = self._partition.text - (whole.shape[1] - image)
        text = torch.cat((whole[:, image:], whole.new_zeros(len(whole), missing, *whole.shape[2:])), 1)
        return torch.cat((whole[:, :image][:, of_image or self._image], text[:, self._text]), 1)

    def _key_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """Mask of the keys of all ranks that are attended to, where each rank's come image first."""
        missing = self._partition.text - mask.shape[1]
        of_text = torch.cat((mask, mask.new_zeros(len(mask), missing)), 1)
        image = mask.new_ones(len(mask), self._partition.height)
        return of_all_ranks(of_text, image, self._partition, text_first=False)


def _cut_before(
    cut: Callable[[Mapping[str, Any]], dict[str, Any]],
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook that cuts what goes into a block, given by name or not."""
    bound = inspect.signature(block.forward).bind(*args, **kwargs)
    bound.arguments.update(cut(bound.arguments))
    return bound.args, bound.kwargs


def _padded(tokens: int) -> int:
    return -(-tokens // SEQ_MULTI_OF) * SEQ_MULTI_OF


def _rotated(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """Queries or keys, (batch, own tokens, heads, channels of a head), turned by their position."""
    numbers = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(numbers * freqs[:, :, None]).flatten(3).type_as(x)


def _same(
    one: Sequence[tuple[torch.Tensor, int | None]], other: Sequence[tuple[torch.Tensor, int | None]]
) -> bool:
    """Whether two lists are of the same tensors, unchanged."""
    return len(one) == len(other) and all(
        a is b and v == w for (a, v), (b, w) in zip(one, other, strict=True)
    )
