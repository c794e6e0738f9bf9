"""Z-Image: `ZImageTransformer2DModel`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import ZImageControlNetModel, ZImageTransformer2DModel
from diffusers.models.attention_processor import Attention as AttentionLayer
from diffusers.models.controlnets import controlnet_z_image as z_image_controls
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

from distriray.errors import InvalidRequest, UnsupportedModel
from distriray.parallel.agreement import Compared
from distriray.parallel.layers.tokens import PatchTokenAttention, Tokens, output_of, projections_of
from distriray.parallel.networks.base import Call, Collect
from distriray.parallel.networks.controls import UsedControl
from distriray.parallel.networks.local import LocalCode
from distriray.parallel.networks.plan import Attention, Blocks, Plan, of_all_ranks
from distriray.parallel.networks.token_control import Added, TokenControl
from distriray.parallel.networks.tokens import TokenNetwork
from distriray.parallel.partition import TokenPartition
from distriray.parallel.share import Share

PATCH = 2
"""Latent rows and columns of a token."""
NAMES = "x", "t", "cap_feats"


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


ATTENTION = {
    "noise_refiner.*.attention": Attention(ZSingleStreamAttnProcessor, PatchZImageAttention, "image"),
    "context_refiner.*.attention": Attention(ZSingleStreamAttnProcessor, None, None),
}
LAYERS = frozenset[type](
    {AttentionLayer, FeedForward, FinalLayer, TimestepEmbedder, ZImageTransformerBlock, nn.ModuleDict}
)
WHOLE = "context_refiner", "cap_embedder"


class ZImageControl(TokenControl):
    """A `ZImageControlNetModel`, whose first layers are its model's own; its picture is given as latents.

    What it adds is to a rank's tokens of the image and of the texts.
    """

    kind = ZImageControlNetModel
    names = NAMES
    plan = Plan(
        cuts={},
        attention={
            **ATTENTION,
            "control_noise_refiner.*.attention": Attention(
                z_image_controls.ZSingleStreamAttnProcessor, PatchZImageAttention, "image"
            ),
            "control_layers.*.attention": Attention(
                z_image_controls.ZSingleStreamAttnProcessor, PatchZImageAttention
            ),
        },
        inputs={},
        whole=WHOLE,
    )
    layers = LAYERS | {
        z_image_controls.FeedForward,
        z_image_controls.ZImageControlTransformerBlock,
        z_image_controls.ZImageTransformerBlock,
    }
    like = ("dim", "n_heads", "n_kv_heads", "norm_eps", "qk_norm", "all_patch_size", "all_f_patch_size")

    @classmethod
    def check_fits(cls, network: Any, transformer: Any) -> None:
        super().check_fits(network, transformer)
        if network.add_control_noise_refiner == "control_layers":
            raise UnsupportedModel(
                "its control_layers look at the image alone first, and then at the text too"
            )
        last, layers = max(network.control_layers_places), len(transformer.layers)
        if last >= layers:
            raise UnsupportedModel(f"it adds to layer {last}, and the model has {layers}")
        takes, latents = network.control_in_dim, transformer.in_channels
        if takes < latents:
            raise UnsupportedModel(f"its pictures have {takes} channels, and latents {latents}")

    @staticmethod
    def arguments(control: UsedControl, given: Mapping[str, Any]) -> dict[str, Any]:
        return {name: given[name] for name in NAMES}

    @staticmethod
    def shown(control: UsedControl) -> dict[str, Any]:
        return {"control_context": list(control.picture), "conditioning_scale": control.scale}

    @staticmethod
    def spread(network: Any, transformer: Any, output: Any) -> dict[str, Added]:
        return {"controlnet_block_samples": output}

    @staticmethod
    def argument(added: Added) -> Any:
        return added

    @contextmanager
    def cutting(self, share: Share, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        network = self.module
        self._tokens.begin(share.tokens, None)
        cutter = _Cutter(share.tokens, share.communicator.rank, self._tokens)
        with ExitStack() as hooks:
            streams = ("x",) if network.add_control_noise_refiner is None else ("c", "x")
            for blocks, names in ((network.noise_refiner, ("x",)), (network.control_noise_refiner, streams)):
                for block in blocks:  # its forward counts tokens between them
                    cut = partial(_cut_before, partial(cutter.image_of_control, whole=names))
                    hooks.enter_context(block.register_forward_pre_hook(cut, with_kwargs=True))
                    hooks.enter_context(block.register_forward_hook(cutter.with_room_for_others))
            cutter.hook(hooks, network.control_layers, cutter.joint, "c", "x")
            yield arguments


class ZImage(TokenNetwork):
    """A `ZImageTransformer2DModel`, called with a list of images and one of texts, of any lengths.

    Image and texts are padded to multiples of 32 tokens, and padding is attended to; what makes the texts of
    a batch equally long is not. A rank has some tokens of the image from the first block on, and of the
    texts where they join it: before that every rank refines the whole of them.
    """

    kind = ZImageTransformer2DModel
    pads_text = False
    names = NAMES
    row_unit = PATCH
    control = ZImageControl
    plan = Plan(
        cuts={},
        attention={
            **ATTENTION,
            "layers.*.attention": Attention(ZSingleStreamAttnProcessor, PatchZImageAttention),
        },
        inputs={},
        whole=WHOLE,
        residuals=("controlnet_block_samples",),
        blocks=Blocks("layers.0", after=f"all_final_layer.{PATCH}-1"),
    )
    layers = LAYERS

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

    def uncaptured(self, call: Call) -> str | None:
        return "ZImageControlNetModel asks the device which tokens are padding" if self.beside(call) else None

    def cached(self, call: Call) -> Any:
        return self.module.rope_embedder.freqs_cis

    def compared(self, call: Call) -> Compared:
        lengths = [len(text) for text in call.arguments["cap_feats"]]
        return super().compared(call).plus(texts={"tokens of each text": repr(lengths)})

    def compute(self, call: Call, share: Share, collect: Collect) -> Any:
        given, self._shared = dict(call.arguments), (share, collect)
        arguments = {
            **given,
            "x": given["x"][share.part],
            "t": share.cut(given["t"]),
            "cap_feats": given["cap_feats"][share.part],
            "controlnet_block_samples": share.cut(given["controlnet_block_samples"]),
            "return_dict": False,
        }
        whole = self.forward(**arguments)
        sizes = [tuple(image.shape[1:]) for image in given["x"]] * len(call.of_halves)
        images = self.module.unpatchify(list(whole.unbind()), sizes, PATCH, 1)
        return Transformer2DModelOutput(sample=images) if given["return_dict"] else (images,)

    def _compute(self, **arguments: Any) -> torch.Tensor:
        """The predicted tokens of all ranks and of the whole batch."""
        share, collect = self._shared
        assert self.replaced is not None
        added = self._beside.added(self.module, arguments, share)
        self._tokens.begin(share.tokens, None)
        cutter = _Cutter(share.tokens, share.communicator.rank, self._tokens)
        final, whole = self.module.all_final_layer[f"{PATCH}-1"], []

        def gather(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            whole.append(self._gather(collect, share.exchanges, module, inputs, output[:, : cutter.own]))
            return whole[0][share.part]

        if arguments["controlnet_block_samples"] is not None:
            arguments["controlnet_block_samples"] = {
                index: cutter.residuals(each) for index, each in arguments["controlnet_block_samples"].items()
            }
        with ExitStack() as hooks:
            cutter.hook(hooks, self.module.noise_refiner, cutter.image)
            cutter.hook(hooks, self.module.layers, cutter.joint)
            hooks.enter_context(final.register_forward_hook(gather))
            self.replaced(**{**arguments, **added})
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

    def hook(
        self, hooks: ExitStack, blocks: nn.ModuleList, cut: Callable[..., dict[str, Any]], *streams: str
    ) -> None:
        """Let blocks see this rank's tokens.

        Args:
            streams: their arguments that are tokens: the first is what the block before has given, and the
                others are whole in each. `x` alone unless given.
        """
        handed_on, *others = streams or ("x",)
        for index, block in enumerate(blocks):
            whole = others if index else (handed_on, *others)
            before = partial(_cut_before, partial(cut, whole=whole))
            hooks.enter_context(block.register_forward_pre_hook(before, with_kwargs=True))

    def residuals(self, tokens: torch.Tensor) -> torch.Tensor:
        """This rank's part of (batch, all tokens of the image and of the longest text, channels)."""
        image, given = self._partition.height, tokens.shape[1]
        most = image + self._partition.text
        if not image < given <= most:
            raise InvalidRequest(
                f"controlnet_block_samples of {given} tokens, where image and text have {most}"
            )
        return self._joined(tokens, image)

    def image(self, given: Mapping[str, Any], whole: Sequence[str]) -> dict[str, Any]:
        """Into a block over the image alone: tokens and freqs_cis, (batch, tokens, channels)."""
        if given["attn_mask"] is not None:
            raise UnsupportedModel("images of different sizes in one call")
        return self._of_image(given, whole)

    def image_of_control(self, given: Mapping[str, Any], whole: Sequence[str]) -> dict[str, Any]:
        """The same of a ControlNet, which masks images of one size too."""
        return {**self._of_image(given, whole), "attn_mask": None}

    def _of_image(self, given: Mapping[str, Any], whole: Sequence[str]) -> dict[str, Any]:
        return {name: given[name][..., self._image, :] for name in (*whole, "freqs_cis")}

    def with_room_for_others(self, block: nn.Module, inputs: Any, own: torch.Tensor) -> torch.Tensor:
        """All of the image's tokens, (..., tokens, channels), of which those of other ranks are zero."""
        whole = own.new_zeros(*own.shape[:-2], self._partition.height, own.shape[-1])
        whole[..., self._image, :] = own
        return whole

    def joint(self, given: Mapping[str, Any], whole: Sequence[str]) -> dict[str, Any]:
        """Into a block over both. Whole are all tokens of the texts, and the image's or this rank's of it."""
        image, mask = self._partition.height, given["attn_mask"]
        cut = {"freqs_cis": self._joined(given["freqs_cis"], image), "attn_mask": None}
        text = given["freqs_cis"].shape[1] - image
        if mask is not None or text < self._partition.text:
            if mask is None:
                mask = given["freqs_cis"].new_ones(given["freqs_cis"].shape[:2], dtype=torch.bool)
            cut["attn_mask"] = self._joined(mask, image)
            if self._tokens.key_mask is None:
                self._tokens.key_mask = self._key_mask(mask[:, image:])
        for name in whole:
            held = given[name].shape[1] - text
            cut[name] = self._joined(given[name], held, slice(None) if held == self.own else self._image)
        return cut

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
