"""What one layer sends and receives: it follows from the partition and the shape of the layer's input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from distriray.parallel.partition import Partition

Messages = tuple[tuple[int, tuple[int, ...]], ...]
"""The shape of the message for each peer, or from it."""


@dataclass(frozen=True)
class Slot:
    """One layer's place in the exchange.

    Attributes:
        send: what this rank sends, by peer.
        receive: what it receives, by peer.
        extents: what every rank owns: rows for statistics, tokens for keys and values, nothing for halos.
    """

    kind: Literal["statistics", "halos", "keys_values"]
    send: Messages
    receive: Messages
    dtype: torch.dtype
    extents: tuple[int, ...] = ()

    @property
    def shares(self) -> tuple[float, ...]:
        """Every rank's part of the whole."""
        return tuple(extent / sum(self.extents) for extent in self.extents)


@lru_cache(4096)
def statistics_slot(partition: Partition, rank: int, shape: tuple[int, ...], groups: int) -> Slot:
    """For a group norm whose input has `shape`, (batch, channels, own rows, columns)."""
    batch, _, rows, columns = shape
    level = partition.level_of(rank, (rows, columns))
    bounds = [partition.rows(peer, level) for peer in range(partition.world_size)]
    messages = tuple((peer, (batch, groups, 2)) for peer in _peers(partition, rank))
    return Slot(
        "statistics", messages, messages, torch.float32, tuple(stop - start for start, stop in bounds)
    )


@lru_cache(4096)
def keys_values_slot(partition: Partition, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Slot:
    """For self-attention whose keys have `shape`, (batch, own tokens, channels), as its values have."""
    batch, own_tokens, channels = shape
    level = partition.level_of(rank, (own_tokens,))
    columns = partition.shape(level)[1]
    tokens = tuple(count * columns for count in _rows(partition, level))
    peers = _peers(partition, rank)
    return Slot(
        "keys_values",
        tuple((peer, (own_tokens, 2, batch, channels)) for peer in peers),
        tuple((peer, (tokens[peer], 2, batch, channels)) for peer in peers),
        dtype,
        tokens,
    )


def _peers(partition: Partition, rank: int) -> list[int]:
    return [peer for peer in range(partition.world_size) if peer != rank]


def _rows(partition: Partition, level: int) -> tuple[int, ...]:
    bounds = (partition.rows(rank, level) for rank in range(partition.world_size))
    return tuple(stop - start for start, stop in bounds)
