"""Attention processors: self-attention over the whole image, cross-attention with cached text."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from distriray.errors import UnsupportedModel
from distriray.parallel.context import PatchContext
from distriray.parallel.exchange.own import Computed, Projected
from distriray.parallel.layers.attending import attend_to_all, attended
from distriray.parallel.layers.bare import is_bare, without_idle_adapters
from distriray.parallel.layers.opaque import Opaque


class _Processor(AttnProcessor2_0, Opaque):
    """diffusers' own processor, except for where the keys and values come from."""

    def __init__(self, context: PatchContext | None = None) -> None:
        # diffusers makes new processors of a class without arguments when an IP-Adapter is loaded; they are
        # found and replaced before the next step.
        super().__init__()
        self.context = context or PatchContext()
        self.enroll()

    @abstractmethod
    def sources(
        self, attn: Attention, hidden_states: torch.Tensor, text: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...] | None:
        """The sources that `exchanged` makes keys and values of; None for those that diffusers computes.

        Returns:
            (batch, tokens, channels) each.
        """

    @abstractmethod
    def exchanged(self, *inputs: Any) -> torch.Tensor:
        """Attention of queries, (batch, tokens, heads, channels of a head), under a mask, given sources."""

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
        if self.context.exchanges:
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
        sources = self.sources(attn, hidden_states, text)
        if sources is None:
            return super().__call__(attn, hidden_states, text, attention_mask, temb)
        if attention_mask is not None:
            assert text is not None
            batch, tokens = text.shape[:2]
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = attention_mask.unflatten(0, (batch, attn.heads))
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        output = self.exchange(query, attention_mask, *sources).flatten(2)
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

    def sources(
        self, attn: Attention, hidden_states: torch.Tensor, text: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...] | None:
        """Keys and values of this rank's tokens; or what they are products of, and both weights."""
        if not self.context.exchanges:
            return None
        projections = [without_idle_adapters(projection) for projection in (attn.to_k, attn.to_v)]
        if all(is_bare(projection, hidden_states) for projection in projections):
            return hidden_states, *(projection.weight for projection in projections)
        return tuple(projection(hidden_states) for projection in projections)

    def exchanged(self, *inputs: Any) -> torch.Tensor:
        query, _, *sources = inputs
        step = self.context.step
        assert step is not None
        own = Computed(*sources) if len(sources) == 2 else Projected(*sources)
        output = attend_to_all(step, query, own, step.tokens_like(query.shape[1]), attended)
        return output.to(query.dtype)


class PatchSpatialAttention(PatchSelfAttention):
    """Self-attention over the pixels of a normalized feature map, added to it, as in a VAE's decoder.

    Hidden states are (batch, channels, this rank's rows, columns).
    """

    def attend(
        self, attn: Attention, hidden_states: torch.Tensor, *inputs: torch.Tensor | None
    ) -> torch.Tensor:
        if not self.context.exchanges:
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
    text at a time is cached. Graphs write it too, for texts of their own shapes, so the shape is always that
    of the call's text.
    """

    def __init__(self, context: PatchContext | None = None) -> None:
        super().__init__(context)
        # Tensors made in inference mode cannot be written outside it.
        self._kinds: dict[bool, tuple[tuple[torch.dtype, torch.device, bool], int]] = {}
        self._memory: dict[tuple[torch.dtype, torch.device, bool], torch.Tensor] = {}

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

    def sources(
        self, attn: Attention, hidden_states: torch.Tensor, text: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...] | None:
        """Keys and values of a text that is new; the text itself if it is that of the step before."""
        if text is None or not self.context.caches_text:
            return None
        return (attn.to_k(text), attn.to_v(text)) if self.context.new_text else (text,)

    def exchanged(self, *inputs: Any) -> torch.Tensor:
        query, attention_mask, *sources = inputs
        key, value = (each.unflatten(-1, query.shape[2:]) for each in self._keys_values(*sources))
        return attended(query, key, value, attention_mask).to(query.dtype)

    def _keys_values(self, *sources: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, (batch, tokens, channels) each."""
        inference, first = torch.is_inference_mode_enabled(), sources[0]
        is_new = len(sources) == 2
        if is_new:
            kind = (first.dtype, first.device, inference)
            self._kinds[inference] = kind, first.shape[2]
            if kind not in self._memory or self._memory[kind][0].numel() < first.numel():
                # Another object, by which graphs are known to be stale.
                self._memory = self._memory | {kind: first.new_empty((2, first.numel()))}
        kind, channels = self._kinds[inference]
        shape = (*first.shape[:2], channels)
        key, value = self._memory[kind][:, : math.prod(shape)].unflatten(1, shape)
        if is_new:
            for kept, now in zip((key, value), sources, strict=True):
                kept.copy_(now)
        return key, value


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
