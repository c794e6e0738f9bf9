"""Halo rows: those around a patch that a convolution reads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from distriray.parallel.exchange.slots import Slot
from distriray.parallel.partition import Partition, Window


class PaddedPatch:
    """A convolution's input between its halo rows, in a buffer that all layers of one shape fill in turn.

    Args:
        partition: who owns which rows.
        rank: whose patch it is.
        input: (batch, channels, this rank's rows, columns).
        window: the convolution that reads them.
    """

    def __init__(self, partition: Partition, rank: int, input: torch.Tensor, window: Window) -> None:
        batch, channels, rows, columns = input.shape
        halo = partition.halo(rank, partition.level_of(rank, (rows, columns)), window)
        counts = {**halo.receive, rank: rows}
        heights = [halo.zeros[0], *(counts.get(peer, 0) for peer in range(partition.world_size))]
        above = sum(heights[: rank + 1])
        below = sum(heights[rank + 2 :]) + halo.zeros[1]
        self.whole = F.pad(torch.zeros_like(input), (0, 0, above, below))  # keeps the memory format
        self._rank = rank
        self._places = {peer: slice(sum(heights[: peer + 1]), sum(heights[: peer + 2])) for peer in counts}
        self._edges = [slice(0, halo.zeros[0]), slice(sum(heights), sum(heights) + halo.zeros[1])]
        self._rows = {peer: self.whole[:, :, place] for peer, place in self._places.items()}
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
        return {peer: self.whole.new_empty(shape) for peer, shape in self.slot.receive}

    def halos(self, padded: torch.Tensor) -> dict[int, torch.Tensor]:
        """The rows of each peer in a tensor of the shape of `whole`, as views."""
        return {peer: padded[:, :, place] for peer, place in self._places.items() if peer != self._rank}

    def clear_edges(self, padded: torch.Tensor) -> None:
        """Put zeros where the image ends into a tensor of the shape of `whole`."""
        for place in self._edges:
            if place.start < place.stop:
                padded[:, :, place] = 0

    def fill(self, input: torch.Tensor, received: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """`input` between the rows `received` from each peer, and zeros where the image ends."""
        self._rows[self._rank].copy_(input)
        for peer, rows in received.items():
            self._rows[peer].copy_(rows)
        return self.whole
