"""A part of a gang as a communicator of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from distriray.collective.base import Communicator, Work
from distriray.collective.messages import Messages, peers_of


class Subgroup:
    """A view of `parent` in which `ranks[i]` is rank `i`.

    It owns nothing: connections, message order, `bytes_sent`, `broken` and `abort` are the parent's, and
    `close` does nothing.
    """

    def __init__(self, parent: Communicator, ranks: Sequence[int]) -> None:
        self._parent = parent
        self._ranks = tuple(ranks)
        if len(set(self._ranks)) != len(self._ranks):
            raise ValueError(f"ranks {list(ranks)} name a rank twice")
        if not all(0 <= rank < parent.world_size for rank in self._ranks):
            raise ValueError(f"ranks {list(ranks)} are not all within a gang of {parent.world_size}")
        if parent.rank not in self._ranks:
            raise ValueError(f"rank {parent.rank} is not among the ranks {list(ranks)} of its sub-group")
        self.rank = self._ranks.index(parent.rank)
        self.world_size = len(self._ranks)
        self.peers = peers_of(self.rank, self.world_size)
        self.device = parent.device

    @property
    def backend(self) -> str:
        return self._parent.backend

    @property
    def bytes_sent(self) -> int:
        return self._parent.bytes_sent

    @property
    def broken(self) -> bool:
        return self._parent.broken

    def check(self) -> None:
        self._parent.check()

    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> Work:
        return self._parent.exchange(self._renamed(sends), self._renamed(receives))

    def messages(self, tensors: Mapping[int, torch.Tensor]) -> Messages:
        return self._parent.messages(self._renamed(tensors))

    def subgroup(self, ranks: Sequence[int]) -> Subgroup:
        return Subgroup(self, ranks)

    def abort(self) -> None:
        self._parent.abort()

    def close(self) -> None:
        pass

    def _renamed(self, tensors: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        if isinstance(tensors, Messages):
            return tensors
        strangers = [rank for rank in tensors if not 0 <= rank < self.world_size]
        if strangers:
            raise ValueError(f"ranks {strangers} are not within a sub-group of {self.world_size}")
        return {self._ranks[rank]: tensor for rank, tensor in tensors.items()}
