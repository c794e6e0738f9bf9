"""Gather of the predicted noise or of the picture from all ranks, with their flags on board."""

from __future__ import annotations

from typing import NamedTuple

import torch

from distriray.collective.all_gather import all_gather
from distriray.collective.base import Communicator
from distriray.errors import GangMismatch
from distriray.parallel.layout import GangLayout
from distriray.parallel.partition import Partition
from distriray.parallel.stopwatch import Stopwatch

HEADER = 48
"""Bytes: yield, cancel, drift, how far apart latents may be; four numbers of a `Place`; their negatives."""


class Flags(NamedTuple):
    """Signals of one rank to the whole gang, or of any of its ranks."""

    yield_: bool = False
    cancel: bool = False


NO_FLAGS = Flags()


class Place(NamedTuple):
    """Position of a rank in an image, which all ranks must have alike.

    Attributes:
        step: number of the step.
        timestep: of the scheduler.
        latents: root sum of squares of the sample, and two sums (`Sums`); (3,).
    """

    step: int
    timestep: float
    latents: torch.Tensor


class Header(NamedTuple):
    """Facts of all ranks that each has after a gather.

    Attributes:
        flags: those that any rank has set.
        drift: the largest of the ranks'.
    """

    flags: Flags
    drift: float


class HeaderOnItsWay:
    """The header of a gather, which a GPU brings to the host when it gets there.

    Args:
        communicator: the gang.
        values: the largest of the ranks' headers, float32 (`HEADER` / 4,), on the gang's device.
    """

    def __init__(self, communicator: Communicator, values: torch.Tensor) -> None:
        self._communicator = communicator
        self._values, self._arrived = values, None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))

    def read(self) -> Header:
        """Wait for the header; only now is what was gathered known to be whole.

        On a GPU this waits for all that was launched up to the gather: read it when more has been launched.

        Raises:
            GangBroken: a peer died or hung.
            GangMismatch: the ranks are not in the same step of the same image.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        yields, cancels, drift, tolerance, *places = self._values.tolist()
        self._communicator.check()  # a transfer that was aborted on a GPU ends too, and leaves garbage
        _check_places(places, tolerance)
        return Header(Flags(bool(yields), bool(cancels)), drift)


def _check_places(places: list[float], tolerance: float) -> None:
    """Raise `GangMismatch`, on all ranks alike, unless they are at the same place.

    Args:
        places: the largest of each number of the ranks' places, and the largest of its negative.
    """
    names = ("step", "timestep", "sum of the latents", "weighted sum of the latents")
    for index, name in enumerate(names):
        high, low = places[index], -places[index + len(names)]
        if high - low > (tolerance if index > 1 else 0.0):
            raise GangMismatch(
                f"the ranks of the gang do not denoise the same image: {name} {low:g} and {high:g}; give all "
                "ranks the same steps, guidance scale, scheduler and callbacks, and equally seeded generators"
            )


class Gathered(NamedTuple):
    """Result of a gather.

    Attributes:
        whole: the noise or the picture, (batch, channels, rows, columns); garbage if `header.read()` raises.
        header: what the ranks said.
    """

    whole: torch.Tensor
    header: HeaderOnItsWay


class Gather:
    """The synchronous gather of one shape.

    Args:
        communicator: the whole gang.
        layout: of the gang.
        partition: the rows of the ranks of one half.
        shape: of the whole, (batch, channels, rows, columns).
        dtype: of the noise or of the picture.

    Attributes:
        waiting: the time in which the last call waited for the peers.
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
        self.waiting = Stopwatch(communicator.device)
        self._tolerance = max(1e-4, 2 * torch.finfo(dtype).eps)
        self._communicator = communicator
        self._rank = communicator.rank
        self._slices: list[tuple[slice, slice]] = []
        self._messages: list[torch.Tensor] = []
        self._parts: list[torch.Tensor] = []
        batch, channels, _, columns = shape
        for rank in range(layout.world_size):
            images, rows = layout.batch_slice(rank, batch), slice(*partition.rows(layout.patch(rank)))
            part = (images.stop - images.start, channels, rows.stop - rows.start, columns)
            size = torch.Size(part).numel() * dtype.itemsize
            message = torch.zeros(HEADER + size, dtype=torch.uint8, device=communicator.device)
            self._slices.append((images, rows))
            self._messages.append(message)
            self._parts.append(message[HEADER:].view(dtype).view(part))

    def __call__(
        self,
        part: torch.Tensor,
        flags: Flags = NO_FLAGS,
        drift: torch.Tensor | float = 0.0,
        place: Place | None = None,
    ) -> Gathered:
        """Swap this rank's part and flags for everybody's.

        Args:
            part: (this rank's part of the batch, channels, this rank's rows, columns).
            drift: a number, or a scalar on the device.
            place: where this rank is; not compared if None.

        Raises:
            GangBroken: a peer died or hung.
        """
        self._write_header(flags, drift, place)
        self._parts[self._rank].copy_(part)
        self.waiting = Stopwatch(self._communicator.device)
        with self.waiting:
            all_gather(self._communicator, self._messages).wait()
        whole = part.new_empty(self.shape)
        for (images, rows), theirs in zip(self._slices, self._parts, strict=True):
            whole[images, :, rows] = theirs
        headers = torch.stack([message[:HEADER].view(torch.float32) for message in self._messages])
        return Gathered(whole, HeaderOnItsWay(self._communicator, headers.amax(0)))

    def _write_header(self, flags: Flags, drift: torch.Tensor | float, place: Place | None) -> None:
        """Fill numbers in: they go to a GPU with the kernel, where a copy from the host would stop it."""
        header = self._messages[self._rank][:HEADER].view(torch.float32)
        for index, value in enumerate((*flags, drift)):
            if isinstance(value, torch.Tensor):
                header[index].copy_(value)
            else:
                header[index].fill_(float(value))
        if place is None:
            return
        own, negative = header[4:].view(2, 4)
        own[0].fill_(place.step)
        own[1].fill_(place.timestep)
        own[2:].copy_(place.latents[1:])
        torch.neg(own, out=negative)
        header[3:4].copy_(place.latents[:1]).mul_(self._tolerance)
