"""Rows around a feature map that the convolution behind it reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


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

    def put(self, input: torch.Tensor) -> torch.Tensor:
        """`input` (batch, channels, rows, columns) between these rows, in its memory format."""
        zeros, above, below, _ = heights = self.heights
        padded = F.pad(input, (0, 0, sum(heights[:2]), sum(heights[2:])))
        if self.above is not None:
            padded[:, :, zeros : zeros + above].copy_(self.above)
        if self.below is not None:
            padded[:, :, -sum(heights[2:]) :][:, :, :below].copy_(self.below)
        return padded

    def clear_zeros(self, padded: torch.Tensor) -> None:
        """Have zeros where the image ends, in a tensor like that of `put`."""
        first, last = self.zeros
        if first:
            padded[:, :, :first].zero_()
        if last:
            padded[:, :, -last:].zero_()
