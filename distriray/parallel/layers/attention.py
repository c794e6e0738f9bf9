"""Attention processors: self-attention over the whole image, cross-attention with cached text."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from distriray.errors import UnsupportedModel
from distriray.parallel.context import PatchContext

if TYPE_CHECKING:
    from distriray.parallel.exchange.steps import Step


class _Processor(AttnProcessor2_0, ABC):
    """diffusers' own processor, except for where the keys and values come from."""

    def __init__(self, context: PatchContext | None = None) -> None:
        # diffusers makes new processors of a class without arguments when an IP-Adapter is loaded; they are
        # found and replaced before the next step.
        super().__init__()
        self.context = context

    @property
    def step(self) -> Step | None:
        """The step of the exchange that is under way."""
        return None if self.context is None else self.context.step

    @abstractmethod
    def keys_values(
        self, attn: Attention, hidden_states: torch.Tensor, text: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(batch, tokens, channels) each, or None for those that diffusers computes."""

    def check(
        self,
        hidden_states: torch.Tensor,
        text: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        temb: torch.Tensor | None,
    ) -> None:
        """Raise `UnsupportedModel` for what is handed over in a step of an exchange and would not be used."""
        if temb is not None:
            raise UnsupportedModel(
                f"attention that is given a temb, which {type(self).__name__} does not use"
            )

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: object,
        **kwargs: object,
    ) -> torch.Tensor:
        # diffusers passes on what this signature names, and warns of the rest.
        if self.step is not None:
            if args or kwargs:
                unused = ", ".join(sorted(kwargs)) or f"{len(args)} more arguments"
                raise UnsupportedModel(f"attention that is given {unused}, which is not used")
            self.check(hidden_states, encoder_hidden_states, attention_mask, temb)
        return self.attend(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

    def attend(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        text: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        keys_values = self.keys_values(attn, hidden_states, text)
        if keys_values is None:
            return super().__call__(attn, hidden_states, text, attention_mask, temb)
        key, value = keys_values
        if attention_mask is not None:
            batch, tokens = hidden_states.shape[0], key.shape[1]
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = attention_mask.unflatten(0, (batch, attn.heads))

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query = heads(attn.to_q(hidden_states))
        output = F.scaled_dot_product_attention(query, heads(key), heads(value), attn_mask=attention_mask)
        output = output.transpose(1, 2).flatten(2).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](output))


class PatchSelfAttention(_Processor):
    """Queries of this rank's tokens against the keys and values of all ranks' (Li et al. 2024, section 4.2).

    Hidden states are (batch, this rank's tokens, channels). Outside a step of an exchange it is diffusers'
    own processor.
    """

    def check(
        self,
        hidden_states: torch.Tensor,
        text: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        temb: torch.Tensor | None,
    ) -> None:
        super().check(hidden_states, text, attention_mask, temb)
        if text is not None and text is not hidden_states:
            raise UnsupportedModel(
                "self-attention that is given other tokens (encoder_hidden_states), as reference-only "
                "attention does: patches attend to the tokens of their own hidden states"
            )
        if attention_mask is not None:
            raise UnsupportedModel("self-attention with an attention_mask, which is not cut into patches")

    def keys_values(
        self, attn: Attention, hidden_states: torch.Tensor, text: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.step is None:
            return None
        return self.step.keys_values(attn.to_k(hidden_states), attn.to_v(hidden_states))


class PatchSpatialAttention(PatchSelfAttention):
    """Self-attention over the pixels of a normalized feature map, added to it, as in a VAE's decoder.

    Hidden states are (batch, channels, this rank's rows, columns).
    """

    def attend(
        self, attn: Attention, hidden_states: torch.Tensor, *inputs: torch.Tensor | None
    ) -> torch.Tensor:
        if self.step is None:
            return super().attend(attn, hidden_states, *inputs)
        normalized = hidden_states if attn.group_norm is None else attn.group_norm(hidden_states)
        output = super().attend(attn, normalized.flatten(2).transpose(1, 2))
        output = output.transpose(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            output = output + hidden_states
        return output / attn.rescale_output_factor


class CachedCrossAttention(_Processor):
    """Cross-attention whose text keys and values are computed once per image.

    They stay in the same memory, where graphs of captured steps find them; all shapes share it, since one
    text at a time is cached.
    """

    def __init__(self, context: PatchContext | None = None) -> None:
        super().__init__(context)
        self._text: dict[Hashable, tuple[torch.Tensor, torch.Tensor]] = {}
        self._memory: dict[Hashable, torch.Tensor] = {}

    def check(
        self,
        hidden_states: torch.Tensor,
        text: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        temb: torch.Tensor | None,
    ) -> None:
        super().check(hidden_states, text, attention_mask, temb)
        if text is None:
            raise UnsupportedModel(
                "cross-attention that is given no text, and would attend to the tokens of one rank's rows"
            )

    def keys_values(
        self, attn: Attention, hidden_states: torch.Tensor, text: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.context is None or text is None or not self.context.caches_text:
            return None
        # Tensors made in inference mode cannot be written outside it.
        of = (text.shape, text.dtype, text.device, torch.is_inference_mode_enabled())
        if of not in self._text or self.context.new_text:
            fresh = attn.to_k(text), attn.to_v(text)
            if of not in self._text or self._text[of][0].dtype != fresh[0].dtype:
                self._text[of] = self._room(fresh[0])
            for kept, now in zip(self._text[of], fresh, strict=True):
                kept.copy_(now)
        return self._text[of]

    def _room(self, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for keys and values of this shape."""
        of = (key.dtype, key.device, torch.is_inference_mode_enabled())
        memory = self._memory.get(of)
        if memory is None or memory[0].numel() < key.numel():
            memory = key.new_empty((2, key.numel()))
            # Another object, by which graphs are known to be stale.
            self._memory = self._memory | {of: memory}
            self._text = {}
        room = memory[:, : key.numel()].unflatten(1, key.shape)
        return room[0], room[1]


def check_plain_attention(name: str, attn: Attention) -> None:
    """Raise `UnsupportedModel` where attention does more than attend to keys and values."""
    for extra in ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross"):
        if getattr(attn, extra, None):
            raise UnsupportedModel(f"{name} has a {extra}, which no supported network has there")
    if attn.residual_connection or attn.rescale_output_factor != 1.0 or attn.added_kv_proj_dim is not None:
        raise UnsupportedModel(f"{name} is not the attention of a supported network")
    if not has_own_scale(attn):
        raise UnsupportedModel(f"{name} has a scale of {attn.scale:g}, not of its heads' channels")


def has_own_scale(attn: Attention) -> bool:
    """Whether logits are divided by the root of a head's channels, as everything but `AttnProcessor` does."""
    scale: float = attn.scale
    return math.isclose(scale, (attn.inner_dim // attn.heads) ** -0.5)
