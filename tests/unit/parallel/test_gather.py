"""What comes of a gather whose transfer was aborted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from distriray.errors import GangBroken, GangMismatch
from distriray.parallel.agreement import check_same_latents
from distriray.parallel.gather import Gather
from distriray.parallel.layout import GangLayout
from distriray.parallel.partition import Partition


class Aborted:
    """As on a GPU: the wait returns, the transfer is aborted meanwhile, and garbage is left."""

    rank, world_size, peers, device, broken = 0, 2, (1,), torch.device("cpu"), False

    def check(self) -> None:
        if self.broken:
            raise GangBroken("rank 1 died")

    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> Any:
        self.broken = True
        for tensor in receives.values():
            tensor.fill_(0xFF)
        return self

    def wait(self) -> None:
        pass


def test_garbage_of_an_aborted_transfer_is_no_result() -> None:
    communicator: Any = Aborted()
    gather = Gather(communicator, GangLayout(2), Partition(8, 8, 2, 2), (1, 4, 8, 8), torch.float32)
    with pytest.raises(GangBroken, match="rank 1 died"):
        gather(torch.zeros((1, 4, 4, 8))).header.read()


class Peer:
    """Rank 1 sends the same sums as rank 0, except that of its latents."""

    rank, world_size, peers, device, broken = 0, 2, (1,), torch.device("cpu"), False

    def check(self) -> None: ...

    def __init__(self, total: float) -> None:
        self.total = total

    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> Any:
        own, peer = sends[1], receives[1]
        peer.copy_(own)
        peer[int(own[0])] = self.total
        return self

    def wait(self) -> None:
        pass


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_equal_latents_are_equal_also_if_they_are_not_finite(value: float) -> None:
    latents = torch.full((1, 4, 8, 8), value)
    check_same_latents(Peer(256 * value), latents, True)  # type: ignore[arg-type]
    with pytest.raises(GangMismatch, match="sum of the latents"):
        check_same_latents(Peer(7.0), latents, True)  # type: ignore[arg-type]
