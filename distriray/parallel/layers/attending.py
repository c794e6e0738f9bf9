"""Attention of a rank's tokens to those of all ranks, one way or the other: what all networks attend by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from distriray.parallel.exchange.own import OwnKeysValues
from distriray.parallel.exchange.step import Step

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Attention of queries to keys and values, (batch, tokens, heads, channels of a head) each, as its output."""


def attend_to_all(
    step: Step,
    query: torch.Tensor,
    own: OwnKeysValues,
    tokens: tuple[int, ...],
    attend: Attend,
    prefix: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """Attention of this rank's tokens to those of all ranks.

    Either this rank attends for its own tokens, to gathered keys and values, or for those of all ranks, with
    its share of the heads.

    Args:
        query: (batch, this rank's tokens, heads, channels of a head).
        own: this rank's keys and values.
        tokens: of every rank.
        attend: the arithmetic.
        prefix: keys and values of tokens before those, which every rank has; (batch, tokens, heads, channels
            of a head) each.

    Returns:
        Like `query`.

    Raises:
        InvalidRequest: the heads cannot be dealt as they are to be.
        UnsupportedModel: the number of this rank's tokens is another one.
    """
    of_a_head = query.shape[3]
    heads = step.dealt_heads(own.shape[2] // of_a_head)
    if heads is None:
        of_all = [each.unflatten(2, (-1, of_a_head)) for each in step.keys_values(own, tokens)]
        return attend(query, *_behind(prefix, of_all))
    projections = query, *(each.unflatten(2, (-1, of_a_head)) for each in own.computed())
    query, *of_all = step.deal_heads(projections, tokens, heads)
    prefix = [each.split(heads, 2)[step.rank] for each in prefix]
    return step.deal_tokens(attend(query, *_behind(prefix, of_all)), tokens, heads)


def attended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of queries to keys and values, (batch, tokens, heads, channels of a head) each."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def of_queries(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What attention gives, in shape alone."""
    return query


def _behind(prefix: Sequence[torch.Tensor], of_all: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Keys and values of all ranks' tokens, behind those of a prefix if there is one."""
    return [torch.cat(parts, 1) for parts in zip(prefix, of_all, strict=True)] if prefix else of_all
