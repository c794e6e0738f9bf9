"""The gang of one, without peers."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from distriray.collective.backend import BackendCommunicator
from distriray.collective.base import Work
from distriray.collective.messages import as_messages
from distriray.collective.rendezvous import Rendezvous


class NothingInFlight:
    """A transfer without messages."""

    def wait(self) -> None:
        pass


class LocalCommunicator(BackendCommunicator):
    """One rank, on any device. It makes a parallelized pipeline behave as the original."""

    backend = "local"

    def __init__(self, device: torch.device) -> None:
        super().__init__(0, 1, device)

    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> Work:
        self.check()
        as_messages(sends, self.rank, self.world_size, self.device)
        as_messages(receives, self.rank, self.world_size, self.device)
        return NothingInFlight()


def join(rendezvous: Rendezvous) -> LocalCommunicator:
    """A communicator at once; there is nobody to meet."""
    return LocalCommunicator(rendezvous.device)
