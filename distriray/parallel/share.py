"""One rank's share of a call, and how inputs are cut to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from distriray.collective.base import Communicator
from distriray.errors import InvalidRequest
from distriray.parallel.layout import GangLayout
from distriray.parallel.partition import Partition, TokenPartition


@dataclass(frozen=True)
class Share:
    """The part of a call that one rank computes.

    Attributes:
        layout: of the whole gang.
        communicator: the ranks that compute the same part of the batch, each its own rows.
        partition: their rows.
        batch: images of the whole call, both guidance branches counted where it has both.
        part: those that this rank computes.
        exchanges: whether layers exchange anything.
        predictions: images that all ranks gather a prediction for: those of the batch, or of the calls of
            both halves.
    """

    layout: GangLayout
    communicator: Communicator
    partition: Partition
    batch: int
    part: slice
    exchanges: bool
    predictions: int

    @property
    def tokens(self) -> TokenPartition:
        """Their tokens: `partition` in a call of a transformer."""
        assert isinstance(self.partition, TokenPartition)
        return self.partition

    @property
    def images(self) -> int:
        """Number of the batch's entries that this rank computes."""
        return self.part.stop - self.part.start

    def whole(self, part: torch.Tensor) -> tuple[int, int, int, int]:
        """(predictions, channels, rows, columns) of an output of which `part` is this rank's."""
        return self.predictions, part.shape[1], self.partition.height, part.shape[3]

    def cut(self, tree: Any) -> Any:
        """This rank's part of the batch, of every tensor that has one; the rest as it is."""
        return pytree.tree_map(self._cut_batch, tree)

    def cut_rows(self, tree: Any) -> Any:
        """This rank's part and rows of feature maps (batch, channels, rows, columns), whatever their level.

        Raises:
            InvalidRequest: a tensor has the size of no level.
        """
        return pytree.tree_map(self._cut_rows, self.cut(tree))

    def _cut_batch(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == self.batch:
            return leaf[self.part]
        return leaf

    def _cut_rows(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or self.partition.world_size == 1:
            return leaf
        for level in range(self.partition.levels + 1):
            if tuple(leaf.shape[2:]) == self.partition.shape(level):
                start, stop = self.partition.rows(self.communicator.rank, level)
                return leaf[:, :, start:stop].contiguous()
        raise InvalidRequest(f"a feature map of {tuple(leaf.shape)} is no level of {self.partition}")
