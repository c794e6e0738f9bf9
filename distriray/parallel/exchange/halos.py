"""Halo rows: those around a patch that a convolution reads."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from distriray.parallel.exchange.slots import Slot
from distriray.parallel.kernels.rows_around import RowsAround
from distriray.parallel.partition import Partition, Window


class PaddedPatch:
    """A convolution's input and the rows around it, for all layers of one shape.

    Args:
        partition: who owns which rows.
        rank: whose patch it is.
        input: (batch, channels, this rank's rows, columns).
        window: the convolution that reads them.
    """

    def __init__(self, partition: Partition, rank: int, input: torch.Tensor, window: Window) -> None:
        batch, channels, rows, columns = input.shape
        halo = partition.halo(rank, partition.level_of(rank, (rows, columns)), window)
        self._rank = rank
        self._zeros = halo.zeros
        self._whole: torch.Tensor | None = None
        self._like = input.new_empty(0)
        self._send = halo.send
        self.slot = Slot(
            "halos",
            tuple(
                (peer, (batch, channels, stop - start, columns)) for peer, (start, stop) in halo.send.items()
            ),
            tuple((peer, (batch, channels, count, columns)) for peer, count in halo.receive.items()),
            input.dtype,
        )

    def sends(self, input: torch.Tensor) -> dict[int, torch.Tensor]:
        """The rows of `input` that each peer reads, as views."""
        return {peer: input[:, :, start:stop] for peer, (start, stop) in self._send.items()}

    def room(self) -> dict[int, torch.Tensor]:
        """Tensors for the rows of each peer."""
        return {peer: self._like.new_empty(shape) for peer, shape in self.slot.receive}

    def around(self, received: Mapping[int, torch.Tensor]) -> RowsAround:
        """The rows `received` from each peer, and zeros where the image ends."""
        ranks = sorted(received)
        above, below = (
            [received[peer] for peer in ranks if (peer < self._rank) is over] for over in (True, False)
        )
        return RowsAround(_one(above), _one(below), self._zeros)

    def fill(self, input: torch.Tensor, received: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """`input` between the rows `received` from each peer, and zeros where the image ends.

        Returns:
            A buffer that the next layer of this shape overwrites, in the memory format of the first input.
        """
        around = self.around(received)
        if self._whole is None:
            self._whole = around.room(input)
            around.clear_zeros(self._whole)
        return around.put(input, self._whole)

    @property
    def nbytes(self) -> int:
        """Memory of the buffer."""
        return 0 if self._whole is None else self._whole.nbytes


def _one(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """Rows of several peers, if patches are lower than what a convolution reads, in one tensor."""
    return torch.cat(parts, 2) if len(parts) > 1 else next(iter(parts), None)
