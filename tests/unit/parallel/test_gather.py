"""What comes of a transfer that was aborted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from distriray.collective import Communicator, run_in_lockstep
from distriray.errors import GangBroken, GangMismatch
from distriray.parallel.agreement import check_same_latents
from distriray.parallel.gather import Gather
from distriray.parallel.layout import GangLayout
from distriray.parallel.parallelize import _share_random_state
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


def test_garbage_of_an_aborted_transfer_is_no_random_state() -> None:
    communicator: Any = Aborted()
    communicator.rank, communicator.peers = 1, (0,)
    before = torch.get_rng_state()
    with pytest.raises(GangBroken, match="rank 1 died"):
        _share_random_state(communicator)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_equal_latents_are_equal_also_if_they_are_not_finite(value: float) -> None:
    def rank(communicator: Communicator, other: float) -> None:
        latents = torch.full((1, 4, 8, 8), value if communicator.rank == 0 else other)
        check_same_latents(communicator, latents, True, None)

    run_in_lockstep(2, lambda communicator: rank(communicator, value))
    with pytest.raises(GangMismatch, match="rank 0 and rank 1 .* sum of the latents"):
        run_in_lockstep(2, lambda communicator: rank(communicator, 0.1))
