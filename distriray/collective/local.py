"""A gang of one: there is nobody to exchange with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from distriray.collective.base import Work
from distriray.collective.messages import as_messages
from distriray.collective.subgroup import Subgroup
from distriray.errors import GangBroken


class NothingInFlight:
    """A transfer that was over before it began."""

    def wait(self) -> None:
        pass


class LocalCommunicator:
    """One rank, on any device. It makes a parallelized pipeline behave as the original."""

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.broken = False

    @property
    def bytes_sent(self) -> int:
        return 0

    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> Work:
        if self.broken:
            raise GangBroken("the communicator was aborted or closed; connect a new one")
        as_messages(sends, self.rank, self.world_size, self.device)
        as_messages(receives, self.rank, self.world_size, self.device)
        return NothingInFlight()

    def subgroup(self, ranks: Sequence[int]) -> Subgroup:
        return Subgroup(self, ranks)

    def abort(self) -> None:
        self.broken = True

    def close(self) -> None:
        self.broken = True
