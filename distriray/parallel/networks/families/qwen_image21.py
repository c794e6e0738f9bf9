"""Qwen-Image 2.1: `QwenImage21Transformer2DModel`."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import QwenImage21Transformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_qwenimage21 import (
    QwenImage21AdaLayerNormContinuous,
    QwenImage21Attention,
    QwenImage21AttnProcessor,
    QwenImage21FlexAttnProcessor,
    QwenImage21KVCache,
    QwenImage21KVLayerCache,
    QwenImage21Rope,
    QwenImage21SwiGLUFeedForward,
    QwenImage21TemporalTimesteps,
    QwenImage21TextProjection,
    QwenImage21TimestepProjEmbeddings,
    QwenImage21TransformerBlock,
    QwenImage21ZeroCenterRMSNorm,
    apply_rotary_emb_qwen,
)
from diffusers.utils.peft_utils import apply_lora_scale
from torch import nn

from distriray.errors import UnsupportedModel
from distriray.parallel.agreement import Compared
from distriray.parallel.layers.tokens import PatchTokenAttention, Tokens, output_of, projections_of
from distriray.parallel.networks.base import Call, Collect
from distriray.parallel.networks.families.qwen_image21_prefixes import Prefixes, keys_and_values
from distriray.parallel.networks.local import LocalCode
from distriray.parallel.networks.plan import Attention, Blocks, Input, Plan
from distriray.parallel.networks.tokens import TokenNetwork
from distriray.parallel.partition import TokenPartition
from distriray.parallel.share import Share

KEPT = "kept keys and values"
"""What errors call those of the prefix, in a `kv_cache`."""
MOST_COPIED = 2**28
"""Bytes of kept keys and values that a graph has a copy of, and copies anew in each step, so that it is of
any image with as many tokens. More are read where they are."""


class PatchQwenImage21Attention(PatchTokenAttention, QwenImage21AttnProcessor):
    """Attention of Qwen-Image 2.1, where hidden states are the prefix, if it is not kept, and own tokens.

    The prefix, text and condition images, looks at itself alone: every rank has all of it.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: torch.Tensor | None = None,
        layer_cache: Any = None,
        kv_cache_mode: str | None = None,
        cache_write_slice: slice | None = None,
        segments: list[tuple[int, int, bool]] | None = None,
        key_valid: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not self.context.exchanges:
            own: torch.Tensor = super().__call__(
                attn,
                hidden_states,
                attention_mask,
                rotary_emb,
                layer_cache,
                kv_cache_mode,
                cache_write_slice,
                segments,
                key_valid,
            )
            return own
        projected = projections_of(attn, hidden_states, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        query, key, value = (x.to(projected[2].dtype) for x in projected)
        if rotary_emb is not None:
            query, key = (apply_rotary_emb_qwen(x, rotary_emb, use_real=False) for x in (query, key))
        if kv_cache_mode == "cached":
            return output_of(attn, self.attend(query, key, value, *layer_cache.get()))
        segments = segments or []
        length = segments[-1][1] if segments else 0
        prefix = query[:, :length], key[:, :length], value[:, :length]
        if kv_cache_mode == "extract":
            layer_cache.store(prefix[1].clone(), prefix[2].clone())
        own = self.attend(query[:, length:], key[:, length:], value[:, length:], *prefix[1:])
        attended = [*_of_prefix(*prefix, segments, key_valid), own]
        return output_of(attn, torch.cat(attended, 1))


def _of_prefix(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Sequence[tuple[int, int, bool]],
    key_valid: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Attention within the prefix: of each text to what is before it, of each condition image to itself too.

    Args:
        query, key, value: (batch, tokens, heads, channels of a head).
        segments: first token, last token and one, and whether it is text.
        key_valid: which tokens are not padding, bool (batch, tokens of prefix and image).

    Returns:
        Of each segment (batch, its tokens, channels).
    """
    attended = []
    for start, stop, is_text in segments:
        mask = None if key_valid is None else key_valid[:, None, None, :stop]
        if is_text:
            before = query.new_ones((1, 1, stop - start, stop), dtype=torch.bool).tril(start)
            mask = before if mask is None else before & mask
        seen = dispatch_attention_fn(query[:, start:stop], key[:, :stop], value[:, :stop], attn_mask=mask)
        attended.append(seen.flatten(2).to(query.dtype))
    return attended


class QwenImage21(TokenNetwork):
    """A `QwenImage21Transformer2DModel`: one sequence of text, condition images, and the image to be drawn.

    All but the last is a prefix that looks at itself alone, and that all else looks at. Every rank computes
    the whole of it, or has its keys and values in the caller's `kv_cache`, and some tokens of the image. What
    a call returns is of the image's tokens alone, of which pipelines take the last.

    The network's own forward finds out on the host in every call where the images stand. Where the prefix is
    kept, that is done once, and a call computes what is left: the image's tokens.
    """

    kind = QwenImage21Transformer2DModel
    pads_text = False
    plan = Plan(
        cuts={},
        attention={
            "transformer_blocks.*.attn": Attention(
                QwenImage21AttnProcessor, PatchQwenImage21Attention, "image"
            )
        },
        inputs={
            "img_shapes": Input("shapes of the images", "plain", batched=False),
            "img_mask": Input("mask of the images", batched=False),
            "encoder_hidden_states_mask": Input("text mask"),
            "kv_cache": Input(KEPT, "near", batched=False),
            "kv_cache_mode": Input("mode of the kv_cache", "plain", batched=False),
        },
        kwargs="attention_kwargs",
        whole=("pos_embed",),
        blocks=Blocks(),
    )
    layers = frozenset[type](
        {
            QwenImage21AdaLayerNormContinuous,
            QwenImage21Attention,
            QwenImage21Rope,
            QwenImage21SwiGLUFeedForward,
            QwenImage21TemporalTimesteps,
            QwenImage21TextProjection,
            QwenImage21TimestepProjEmbeddings,
            QwenImage21TransformerBlock,
            QwenImage21ZeroCenterRMSNorm,
        }
    )

    def __init__(self, module: Any, local: LocalCode | None = None) -> None:
        self._prefixes = Prefixes()
        self._read_in_place: list[torch.Tensor] = []
        super().__init__(module, local)

    def check(self) -> None:
        for name, attention, _ in self._attentions():
            if isinstance(getattr(attention, "processor", None), QwenImage21FlexAttnProcessor):
                raise UnsupportedModel(
                    f"{name} uses QwenImage21FlexAttnProcessor, whose mask is of all tokens; call "
                    "set_attn_processor(QwenImage21AttnProcessor())"
                )
        super().check()

    def uncaptured(self, call: Call) -> str | None:
        if not self._computes_what_is_left(call):
            return "QwenImage21Transformer2DModel reads where the images are, in calls without a kept prefix"
        return None

    def switches(self) -> Hashable:
        # Whatever lies there in a later call, a graph that reads it there reads what that call was given.
        places = [(x.data_ptr(), x.shape, x.stride(), x.dtype) for x in self._read_in_place]
        return super().switches(), *places

    def may_be_short(self, call: Call) -> bool:
        # All blocks fill a cache, and what they add to its prefix is nothing for later steps.
        return super().may_be_short(call) and call.arguments["kv_cache_mode"] != "extract"

    def partition(self, call: Call, patches: int) -> TokenPartition:
        *conditions, _ = call.arguments["img_shapes"][0]
        image = self.image_tokens(call.sample) - sum(map(math.prod, conditions))
        return TokenPartition.of(image, 0, patches)

    def compared(self, call: Call) -> Compared:
        compared, cache = super().compared(call), call.arguments["kv_cache"]
        if cache is None or call.arguments["kv_cache_mode"] != "cached":
            return compared
        kept = keys_and_values(cache)
        # A part of the batch is not what the others have.
        return compared.plus(near={KEPT: kept if len(kept[0]) == call.batch else []})

    def compute(self, call: Call, share: Share, collect: Collect) -> Any:
        cache, mode = call.arguments["kv_cache"], call.arguments["kv_cache_mode"]
        if cache is None:
            return super().compute(call, share, collect)
        given = dict(call.arguments)
        if mode == "cached":
            given["kv_cache"] = self._prefixes.own_part(cache, share)
            if self._computes_what_is_left(call):
                return self._compute_what_is_left(call, given["kv_cache"], share, collect)
        output = super().compute(replace(call, arguments=given), share, collect)
        if mode == "extract":
            self._prefixes.keep(cache, share)
        return output

    def _computes_what_is_left(self, call: Call) -> bool:
        """Whether the prefix is kept, and nothing stands in the place of the class's forward."""
        own = getattr(self.replaced, "__func__", None) is self.kind.forward
        return own and call.arguments["kv_cache_mode"] == "cached"

    def _compute_what_is_left(
        self, call: Call, kept: QwenImage21KVCache, share: Share, collect: Collect
    ) -> Any:
        """`compute` of a call whose prefix this rank has kept."""
        self._shared = share, collect
        standing, keys_values = self._prefixes.standing(call, self.module.pos_embed), keys_and_values(kept)
        if call.short:
            keys_values = keys_values[:2]  # of the first block
        copied = sum(each.nbytes for each in keys_values) <= MOST_COPIED
        self._read_in_place = [] if copied else keys_values
        try:
            output = self.forward(
                hidden_states=share.cut(call.sample),
                timestep=share.cut(call.timestep),
                rotary=standing.rotary,
                key_mask=share.cut(standing.key_mask),
                kept=keys_values if copied else [],
                attention_kwargs=call.text_scale,
            )
        finally:
            self._read_in_place = []
        return Transformer2DModelOutput(output) if call.arguments["return_dict"] else (output,)

    def _compute(self, **arguments: Any) -> Any:
        if "kept" in arguments:
            return apply_lora_scale("attention_kwargs")(self._of_image)(self.module, **arguments)
        share, _ = self._shared
        cutter = _Cutter(share.tokens, share.communicator.rank, self._tokens, share.exchanges)
        blocks, norm = self.module.transformer_blocks, self.module.norm_out
        with ExitStack() as hooks:
            hooks.enter_context(self.module.pos_embed.register_forward_hook(cutter.after_positions))
            for index, block in enumerate(blocks):
                before = partial(cutter.before_block, index == 0)
                hooks.enter_context(block.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(norm.register_forward_pre_hook(cutter.before_norm))
            return super()._compute(**arguments)

    def _of_image(
        self,
        module: Any,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        rotary: torch.Tensor,
        key_mask: torch.Tensor | None,
        kept: list[torch.Tensor],
        attention_kwargs: dict[str, Any] | None,
    ) -> torch.Tensor:
        """What the network's forward makes of the image's tokens behind a prefix that is kept: of all ranks.

        Args:
            hidden_states: of all images, (this rank's part of the batch, tokens, channels).
            kept: keys and values of each block in turn, (part of the batch, tokens, heads, channels); none if
                they are read in place.
            attention_kwargs: the scale of LoRAs, which is applied already.
        """
        share, collect = self._shared
        partition, rank = share.tokens, share.communicator.rank
        kept = kept or self._read_in_place
        start, stop = partition.rows(rank)
        cutter = _Cutter(partition, rank, self._tokens, share.exchanges)
        self._tokens.begin(partition, key_mask)
        tokens = module.img_in(hidden_states)[:, -partition.height :][:, start:stop].contiguous()
        # The last one is of tokens that know no step, of which there are none here.
        timesteps = torch.cat([timestep.to(tokens.dtype), timestep.new_zeros(1, dtype=tokens.dtype)])
        embedding = module.time_text_embed(timesteps, tokens)
        modulation = module.modulation(embedding)
        drawn = torch.ones(stop - start, dtype=torch.bool, device=tokens.device)
        for block, key, value in zip(module.transformer_blocks, kept[::2], kept[1::2], strict=True):
            layer = QwenImage21KVLayerCache()
            layer.store(key, value)
            tokens = block(
                hidden_states=tokens,
                modulation=modulation,
                rotary_emb=rotary[start:stop],
                attention_mask=cutter.cut_mask(key_mask),
                target_token_mask=drawn,
                layer_cache=layer,
                kv_cache_mode="cached",
            )
        output = module.proj_out(module.norm_out(tokens, embedding, drawn))
        return self._gather(collect, share.exchanges, module.proj_out, (), output)

    def _gather(
        self, collect: Collect, exchanges: bool, module: nn.Module, inputs: Any, output: torch.Tensor
    ) -> torch.Tensor:
        own = self._tokens.of("image")[self._shared[0].communicator.rank]
        return super()._gather(collect, exchanges, module, inputs, output[:, -own:])


class _Cutter:
    """Cuts what is of prefix and image, by hooks, to the prefix and the image's tokens of one rank."""

    def __init__(self, partition: TokenPartition, rank: int, tokens: Tokens, exchanges: bool) -> None:
        self._partition, self._rank = partition, rank
        self._tokens, self._exchanges = tokens, exchanges

    def after_positions(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """Of what turns queries and keys, (tokens, channels)."""
        return self._cut(output, 0)

    def before_block(
        self, first: bool, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of the arguments of a block, which are given by name; hidden states are those of the `first`."""
        cut = {"target_token_mask": self.cut_mask(kwargs["target_token_mask"])}
        if first:
            cut["hidden_states"] = self._cut(kwargs["hidden_states"], 1)
        if self._exchanges:
            if first:
                self._tokens.key_mask = self._key_mask(kwargs)
        else:
            masks = "attention_mask", "key_valid"
            cut |= {name: self.cut_mask(kwargs[name]) for name in masks}
        return args, {**kwargs, **cut}

    def before_norm(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Of the last norm's arguments: hidden states, embedding of the timestep, and mask."""
        hidden_states, embedding, mask = args
        return hidden_states, embedding, self.cut_mask(mask)

    def _key_mask(self, given: dict[str, Any]) -> torch.Tensor | None:
        """Which tokens the image's attend to, of the prefix and of all ranks, (batch, 1, 1, tokens)."""
        mask: torch.Tensor | None = given["attention_mask"]
        if mask is None and given["key_valid"] is not None:
            mask = given["key_valid"][:, None, None]
        return mask

    def cut_mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Of a mask of tokens, (…, tokens), if there is one."""
        return None if mask is None else self._cut(mask, -1)

    def _cut(self, whole: torch.Tensor, dimension: int) -> torch.Tensor:
        """What comes before the image, if that is there, and this rank's tokens of it."""
        if self._partition.world_size == 1:
            return whole
        prefix = whole.shape[dimension] - self._partition.height
        start, stop = self._partition.rows(self._rank)
        parts = (0, prefix), (prefix + start, stop - start)
        return torch.cat([whole.narrow(dimension, *part) for part in parts], dimension)
