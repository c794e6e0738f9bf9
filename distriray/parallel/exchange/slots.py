"""Slots: what one layer sends and receives, which follows from the partition and its input's shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from distriray.collective.messages import peers_of
from distriray.config import Kind
from distriray.errors import UnsupportedModel
from distriray.parallel.partition import Partition

ALIGN = 16
"""Bytes: parts of a message begin at multiples of it."""

LAYERS_CHANGED = "the network's layers changed in the middle of an image"

Shapes = tuple[tuple[int, tuple[int, ...]], ...]
"""The shape of the message for each peer, or from it."""

Values = Mapping[int, torch.Tensor]
"""Values of a slot: for each peer, from it, or of each rank."""


@dataclass(frozen=True)
class Slot:
    """One layer's place in the exchange.

    Attributes:
        send: what this rank sends, by peer.
        receive: what it receives, by peer.
        extents: what every rank owns: rows for statistics, tokens for keys and values, nothing for halos.
    """

    kind: Kind
    send: Shapes
    receive: Shapes
    dtype: torch.dtype
    extents: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the statistics, or of this rank's keys and values, that all peers are sent."""
        return self.send[0][1]

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape of keys and values of all ranks, (tokens, 2, batch, channels)."""
        return sum(self.extents), *self.shape[1:]


@lru_cache(4096)
def statistics_slot(partition: Partition, rank: int, shape: tuple[int, ...], groups: int) -> Slot:
    """The slot of a group norm whose input has `shape`, (batch, channels, this rank's rows, columns)."""
    batch, _, rows, columns = shape
    level = partition.level_of(rank, (rows, columns))
    messages = tuple((peer, (batch, groups, 2)) for peer in peers_of(rank, partition.world_size))
    return Slot("statistics", messages, messages, torch.float32, partition.counts(level))


@lru_cache(4096)
def keys_values_slot(
    partition: Partition,
    rank: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tokens: tuple[int, ...],
) -> Slot:
    """The slot of self-attention whose keys have `shape`, (batch, this rank's tokens, channels).

    Args:
        tokens: of every rank.

    Raises:
        UnsupportedModel: this rank has another number of tokens.
    """
    batch, own_tokens, channels = shape
    if own_tokens != tokens[rank]:
        raise UnsupportedModel(f"attention over {own_tokens} tokens, where this rank has {tokens[rank]}")
    peers = peers_of(rank, partition.world_size)
    return Slot(
        "keys_values",
        tuple((peer, (own_tokens, 2, batch, channels)) for peer in peers),
        tuple((peer, (tokens[peer], 2, batch, channels)) for peer in peers),
        dtype,
        tokens,
    )


def aligned(nbytes: int) -> int:
    """`nbytes` or the next multiple of `ALIGN`."""
    return -(-nbytes // ALIGN) * ALIGN
