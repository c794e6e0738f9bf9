"""Rows around a feature map that the convolution behind it reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RowsAround:
    """Those above and below this rank's rows: of its peers, and outside them zeros, where the image ends.

    Attributes:
        above, below: of peers, (batch, channels, rows, columns), contiguous; None if there are none.
        zeros: rows of them above `above` and below `below`.
    """

    above: torch.Tensor | None
    below: torch.Tensor | None
    zeros: tuple[int, int] = (0, 0)

    @property
    def heights(self) -> tuple[int, int, int, int]:
        """Rows of zeros, above, below, and of zeros again."""
        above, below = (0 if rows is None else rows.shape[2] for rows in (self.above, self.below))
        return self.zeros[0], above, below, self.zeros[1]

    def room(self, input: torch.Tensor) -> torch.Tensor:
        """Uninitialized memory for `input` (batch, channels, rows, columns) and these rows, in its format."""
        batch, channels, rows, columns = input.shape
        last = channels > 1 and input.stride(1) == 1
        return torch.empty(
            (batch, channels, rows + sum(self.heights), columns),
            dtype=input.dtype,
            device=input.device,
            memory_format=torch.channels_last if last else torch.contiguous_format,
        )

    def put(self, input: torch.Tensor, padded: torch.Tensor) -> torch.Tensor:
        """`padded`, a `room`, with `input` between these rows; where the image ends it stays as it is."""
        zeros, above, below, _ = self.heights
        parts = padded[:, :, zeros:].split([above, input.shape[2], below, self.zeros[1]], 2)
        for part, rows in zip(parts, (self.above, input, self.below), strict=False):
            if rows is not None:
                part.copy_(rows)
        return padded

    def clear_zeros(self, padded: torch.Tensor) -> None:
        """Have zeros where the image ends, in a `room`."""
        first, last = self.zeros
        if first:
            padded[:, :, :first].zero_()
        if last:
            padded[:, :, -last:].zero_()
