"""Weights of extrapolation fitted to an image, by torch's operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Fit:
    """`FittedWeights`."""

    def __init__(self, received: torch.Tensor, parts: Sequence[int]) -> None:
        self.sums = torch.zeros((2, len(parts)), device=received.device)
        self._parts = torch.tensor(parts, device=received.device)
        self._zero = self.sums.new_zeros(())

    def extrapolate(
        self, received: torch.Tensor, before: torch.Tensor, change: torch.Tensor, forgetting: float
    ) -> None:
        """`FittedWeights.extrapolate`."""
        last = received - before
        self._add(last.float(), change.float(), forgetting)
        follows, squares = self.sums.unbind()
        weights = follows.div(squares).fmax(self._zero).clamp_max_(1.0)  # 0 / 0 where nothing changed: 0
        each = weights.to(last.dtype).repeat_interleave(self._parts, output_size=last.numel())
        torch.addcmul(received, each.view_as(last), last, out=before)
        change.copy_(last)

    def _add(self, last: torch.Tensor, earlier: torch.Tensor, forgetting: float) -> None:
        sums = torch.stack((self._sum(last * earlier), self._sum(earlier.square())))
        torch.add(sums, self.sums, alpha=forgetting, out=self.sums)

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """That of each part."""
        return torch.segment_reduce(values.flatten(), "sum", lengths=self._parts, unsafe=True)
