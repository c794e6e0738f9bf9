"""What comes of a gather whose transfer was aborted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from distriray.errors import GangBroken
from distriray.parallel.gather import Gather
from distriray.parallel.partition import Partition


class Aborted:
    """As on a GPU: the wait returns, the transfer is aborted meanwhile, and garbage is left."""

    rank, world_size, device, broken = 0, 2, torch.device("cpu"), False

    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> Any:
        if self.broken:
            raise GangBroken("rank 1 died")
        self.broken = True
        for tensor in receives.values():
            tensor.fill_(0xFF)
        return self

    def wait(self) -> None:
        pass


def test_garbage_of_an_aborted_transfer_is_no_result() -> None:
    gather = Gather(Aborted(), Partition(8, 8, 2, 2), (1, 4, 8, 8), torch.float32)  # type: ignore[arg-type]
    with pytest.raises(GangBroken, match="rank 1 died"):
        gather(torch.zeros((1, 4, 4, 8)), (False, False), 0.0)
