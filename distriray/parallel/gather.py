"""Gather of the predicted noise or of the picture from all ranks, with their flags on board."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from distriray.collective.all_gather import all_gather
from distriray.collective.base import Communicator
from distriray.parallel.layout import GangLayout
from distriray.parallel.partition import Partition

_HEADER = 16  # bytes: yield, cancel and drift as float32, and padding


class Flags(NamedTuple):
    """What one rank asks of the whole gang, or what any of its ranks has asked."""

    yield_: bool = False
    cancel: bool = False


NO_FLAGS = Flags()


class Gathered(NamedTuple):
    """What every rank knows after a gather.

    Attributes:
        whole: the noise or the picture, (batch, channels, rows, columns).
        flags: those that any rank has set.
        drift: the largest of the ranks'.
    """

    whole: torch.Tensor
    flags: Flags
    drift: float


class Gather:
    """The synchronous gather of one shape.

    Args:
        communicator: the whole gang.
        layout: of the gang.
        partition: the rows of the ranks of one half.
        shape: of the whole, (batch, channels, rows, columns).
        dtype: of the noise or of the picture.

    Attributes:
        wait_s: seconds that the last call has waited for the peers.
    """

    def __init__(
        self,
        communicator: Communicator,
        layout: GangLayout,
        partition: Partition,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.wait_s = 0.0
        self._communicator = communicator
        self._rank = communicator.rank
        self._places: list[tuple[slice, slice]] = []
        self._messages: list[torch.Tensor] = []
        self._parts: list[torch.Tensor] = []
        batch, channels, _, columns = shape
        for rank in range(layout.world_size):
            images, rows = layout.batch_slice(rank, batch), slice(*partition.rows(layout.patch(rank)))
            part = (images.stop - images.start, channels, rows.stop - rows.start, columns)
            size = torch.Size(part).numel() * dtype.itemsize
            message = torch.zeros(_HEADER + size, dtype=torch.uint8, device=communicator.device)
            self._places.append((images, rows))
            self._messages.append(message)
            self._parts.append(message[_HEADER:].view(dtype).view(part))

    def __call__(self, part: torch.Tensor, flags: Flags = NO_FLAGS, drift: float = 0.0) -> Gathered:
        """Swap this rank's part and flags for everybody's.

        Args:
            part: (this rank's part of the batch, channels, this rank's rows, columns).

        Raises:
            GangBroken: a peer died or hung.
        """
        own = self._messages[self._rank]
        header = torch.tensor([*map(float, flags), drift, 0.0], dtype=torch.float32)
        own[:_HEADER].view(torch.float32).copy_(header)
        self._parts[self._rank].copy_(part)
        started = time.perf_counter()
        all_gather(self._communicator, self._messages).wait()
        self.wait_s = time.perf_counter() - started
        whole = part.new_empty(self.shape)
        for (images, rows), theirs in zip(self._places, self._parts, strict=True):
            whole[images, :, rows] = theirs
        headers = torch.stack([message[:_HEADER].view(torch.float32) for message in self._messages])
        yields, cancels, drift, _ = headers.max(0).values.tolist()
        self._communicator.check()  # a transfer that was aborted on a GPU ends too, and leaves garbage
        return Gathered(whole, Flags(bool(yields), bool(cancels)), drift)
