"""The protocol of every communicator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch

from distriray.collective.messages import Messages


class Work(Protocol):
    """A transfer in flight."""

    def wait(self) -> None:
        """Return once received tensors may be read and sent tensors overwritten.

        On a GPU this orders the current stream behind the transfer and does not block the host.

        Raises:
            GangBroken: a peer died, the transfer outlasted the timeout, or the communicator was aborted.
        """


@runtime_checkable
class Communicator(Protocol):
    """A fixed set of ranks that can exchange tensors point to point.

    One verb moves everything: gathers, halos and broadcasts are groups of sends and receives, so a
    sub-group is only a renaming of ranks and costs nothing. Messages between two ranks arrive in the order
    in which both sides name them; all ranks therefore issue their transfers in the same order.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def backend(self) -> str:
        """The name of the way in which it moves bytes."""

    @property
    def peers(self) -> tuple[int, ...]:
        """The other ranks, ascending."""

    @property
    def bytes_sent(self) -> int:
        """Bytes sent by this rank since the communicator was made."""

    @property
    def broken(self) -> bool:
        """Whether a transfer failed or `abort` was called; every later call raises `GangBroken`."""

    def check(self) -> None:
        """Raise the `GangBroken` that says why, if the communicator is broken.

        On a GPU `wait` returns before the transfer is over, and an aborted transfer leaves garbage: check
        after received values came to the host and before they are trusted.
        """

    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> Work:
        """Start one group of transfers and return at once.

        Args:
            sends: for each destination rank, a contiguous tensor of any dtype on `device`, left unchanged
                until the work is waited for.
            receives: for each source rank, a contiguous tensor of exactly the size its peer sends.

        Raises:
            GangBroken: the communicator is broken.
            ValueError: a tensor is not contiguous or not on `device`, or for no other rank of the gang.
        """

    def messages(self, tensors: Mapping[int, torch.Tensor]) -> Messages:
        """Tensors by peer for `exchange`, which looks at them here and no more, however often it moves them.

        Raises:
            ValueError: as from `exchange`.
        """

    def subgroup(self, ranks: Sequence[int]) -> Communicator:
        """A view of this communicator in which `ranks[i]` is rank `i`; this rank must be among them.

        Views share the parent's connections: every member makes and uses them in the same order.
        """

    def abort(self) -> None:
        """Break the communicator from any thread: pending and later transfers raise `GangBroken`."""

    def close(self) -> None:
        """Release connections and memory. Idempotent; peers need not close at the same time."""
