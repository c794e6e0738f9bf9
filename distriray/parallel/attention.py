"""Attention processors: self-attention over the whole image, cross-attention with cached text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

if TYPE_CHECKING:
    from distriray.parallel.engine import Engine


class PatchSelfAttention(AttnProcessor2_0):
    """Queries of the own tokens against the keys and values of every rank's (Li et al. 2024, section 4.2).

    Hidden states are (batch, own tokens, channels). Without an active exchange, diffusers' own processor.
    """

    def __init__(self, engine: Engine | None = None) -> None:
        # diffusers makes new processors of this class without arguments when an IP-Adapter is loaded;
        # the engine finds and binds them before the next image.
        super().__init__()
        self.engine = engine

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
        exchange = None if self.engine is None else self.engine.exchange
        if exchange is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        key, value = exchange.keys_values(attn.to_k(hidden_states), attn.to_v(hidden_states))
        return _attend(attn, hidden_states, key, value)


class CachedCrossAttention(AttnProcessor2_0):
    """Cross-attention whose text keys and values are computed once per image."""

    def __init__(self, engine: Engine | None = None) -> None:
        super().__init__()
        self.engine = engine
        self._epoch: int | None = None
        self._text: tuple[torch.Tensor, torch.Tensor] | None = None

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
        if self.engine is None or encoder_hidden_states is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if self._text is None or self._epoch != self.engine.text_epoch:
            self._text = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
            self._epoch = self.engine.text_epoch
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(
                attention_mask, encoder_hidden_states.shape[1], hidden_states.shape[0]
            )
            attention_mask = attention_mask.view(
                hidden_states.shape[0], attn.heads, -1, attention_mask.shape[-1]
            )
        return _attend(attn, hidden_states, *self._text, attention_mask)


def _attend(
    attn: Attention,
    hidden_states: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention and the output projection; `key` and `value` (batch, tokens, channels)."""

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    query = heads(attn.to_q(hidden_states))
    output = F.scaled_dot_product_attention(query, heads(key), heads(value), attn_mask=attention_mask)
    output = output.transpose(1, 2).flatten(2).to(query.dtype)
    return attn.to_out[1](attn.to_out[0](output))
