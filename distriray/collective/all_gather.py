"""The one pattern that gangs exchange in: every rank sends the same tensor to all others."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distriray.collective.base import Communicator, Work


def all_gather(communicator: Communicator, tensors: Sequence[torch.Tensor]) -> Work:
    """Start an all-gather in place and return at once.

    Args:
        communicator: of the ranks that take part, which all call this.
        tensors: one for each rank, contiguous, on the communicator's device. This rank's own is sent to every
            peer and stays as it is; the others are received into, each of the size that its rank sends.

    Raises:
        GangBroken: the communicator is broken.
    """
    peers = communicator.peers
    sends = dict.fromkeys(peers, tensors[communicator.rank])
    return communicator.exchange(sends, {peer: tensors[peer] for peer in peers})


def numbers_of_all(communicator: Communicator, number: int) -> list[int]:
    """A number of every rank, by rank; all of them call it.

    Raises:
        GangBroken: a peer died or hung.
    """
    ranks, device = communicator.world_size, communicator.device
    everyone = [torch.tensor([number], device=device) for _ in range(ranks)]
    all_gather(communicator, everyone).wait()
    numbers: list[int] = torch.cat(everyone).tolist()
    communicator.check()  # on a GPU a transfer that was aborted ends like any other, and leaves garbage
    return numbers
