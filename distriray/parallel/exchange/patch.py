"""One rank's patch and its peers, as every step of an exchange needs them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from distriray.collective.base import Communicator
from distriray.config import AttentionMode
from distriray.parallel.exchange.halos import PaddedPatch
from distriray.parallel.exchange.own import OwnKeysValues
from distriray.parallel.exchange.slots import Slot, keys_values_slot, statistics_slot
from distriray.parallel.partition import Partition, Window, dealt_heads


class Patch:
    """This rank's rows of an image, among those of its peers.

    Args:
        communicator: the ranks among which one image's rows are spread.
        partition: who owns which rows.
        attention: how heads are dealt, where they are.
    """

    def __init__(
        self, communicator: Communicator, partition: Partition, attention: AttentionMode = "gather"
    ) -> None:
        self.communicator = communicator
        self.partition = partition
        self.attention = attention
        self.rank = communicator.rank
        self._padded: dict[tuple[object, ...], PaddedPatch] = {}
        self._scratch: dict[tuple[object, ...], torch.Tensor] = {}
        self._shares: dict[torch.Size, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Memory of the padded inputs and of what steps scribble on."""
        padded = sum(padded.nbytes for padded in self._padded.values())
        return padded + sum(scratch.nbytes for scratch in self._scratch.values())

    def padded(self, input: torch.Tensor, window: Window) -> PaddedPatch:
        """The rows around `input`, one object for all layers that are alike.

        Args:
            input: (batch, channels, this rank's rows, columns).
        """
        key = (input.shape, input.dtype, window)
        padded = self._padded.get(key)
        if padded is None:
            padded = self._padded[key] = PaddedPatch(self.partition, self.rank, input, window)
        return padded

    def cut(self, whole: torch.Tensor, window: Window) -> torch.Tensor:
        """The rows that a convolution reads for this rank's output, zeros outside the image.

        Args:
            whole: (batch, channels, rows of all ranks, columns).
        """
        size = tuple(whole.shape[2:])
        level = next(n for n in range(self.partition.levels + 1) if self.partition.shape(n) == size)
        start, stop = self.partition.reads(self.rank, level, window)
        rows = whole[:, :, max(start, 0) : min(stop, size[0])]
        return F.pad(rows, (0, 0, max(-start, 0), max(stop - size[0], 0)))

    def scratch(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """A buffer that the next layer which asks for this shape overwrites."""
        key = (shape, like.dtype, like.device)
        scratch = self._scratch.get(key)
        if scratch is None:
            scratch = self._scratch[key] = like.new_empty(shape)
        return scratch

    def drop_buffers(self) -> None:
        """Give the memory of the padded inputs and of the scratch back."""
        self._padded.clear()
        self._scratch.clear()

    def shares(self, input: torch.Tensor) -> torch.Tensor:
        """Every rank's share of the rows at the level of `input`, float32 (ranks, 1, 1)."""
        size = input.shape[2:]
        shares = self._shares.get(size)
        if shares is None:
            rows = self.partition.counts(self.partition.level_of(self.rank, size))
            values = [count / sum(rows) for count in rows]
            shares = torch.tensor(values, device=self.communicator.device).view(-1, 1, 1)
            self._shares[size] = shares
        return shares

    def statistics_slot(self, input: torch.Tensor, groups: int) -> Slot:
        """The slot of a group norm of `input`."""
        return statistics_slot(self.partition, self.rank, input.shape, groups)

    def dealt_heads(self, heads: int) -> tuple[int, ...] | None:
        """How many of so many heads each rank gets; None where keys and values are gathered."""
        return dealt_heads(self.attention, heads, self.partition.world_size)

    def keys_values_slot(self, own: OwnKeysValues, tokens: tuple[int, ...]) -> Slot:
        """The slot of self-attention with such keys and values of this rank, over `tokens` of every rank."""
        return keys_values_slot(self.partition, self.rank, own.shape, own.like.dtype, tokens)
