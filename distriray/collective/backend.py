"""Base of the communicators that own connections: place in the gang, bytes sent, cause of failure."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from distriray.collective.all_gather import all_gather
from distriray.collective.base import Work
from distriray.collective.messages import Messages, as_messages, indexed, peers_of
from distriray.collective.subgroup import Subgroup
from distriray.errors import GangBroken


class BackendCommunicator(ABC):
    """Base of the communicators that own connections; `Communicator` documents what each verb promises."""

    backend: ClassVar[str]
    """Its name in `BACKENDS`."""

    def __init__(self, rank: int, world_size: int, device: torch.device | str) -> None:
        self.rank = rank
        self.world_size = world_size
        self.peers = peers_of(rank, world_size)
        self.device = indexed(device)
        self._bytes_sent = 0
        self._failure: str | None = None
        self._failing = threading.Lock()

    @property
    def bytes_sent(self) -> int:
        return self._bytes_sent

    @property
    def broken(self) -> bool:
        return self._failure is not None

    def check(self) -> None:
        if self._failure is not None:
            raise GangBroken(self._failure)

    @abstractmethod
    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> Work: ...

    def greet(self) -> None:
        """Exchange one byte with every peer: afterwards no rank is still connecting."""
        all_gather(self, [torch.ones(1, dtype=torch.uint8) for _ in range(self.world_size)]).wait()
        self._bytes_sent = 0

    def messages(self, tensors: Mapping[int, torch.Tensor]) -> Messages:
        return Messages(as_messages(tensors, self.rank, self.world_size, self.device), tensors)

    def subgroup(self, ranks: Sequence[int]) -> Subgroup:
        return Subgroup(self, ranks)

    def abort(self) -> None:
        self._fail(f"the communicator was aborted on rank {self.rank}")

    def close(self) -> None:
        self._fail(f"the communicator was closed on rank {self.rank}")

    def _fail(self, cause: str) -> GangBroken:
        """Record the first cause, release the connections once, and return the error that names the cause."""
        with self._failing:
            first = self._failure is None
            if first:
                self._failure = cause
        if first:
            self._release()
        return GangBroken(self._failure)

    def _release(self) -> None:  # noqa: B027 - a rank alone has no connections
        """Cut every connection, so that nobody goes on waiting for this rank."""
