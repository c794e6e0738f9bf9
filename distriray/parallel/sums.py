"""Sums of tensors, by which ranks compare them without sending them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_COLUMNS = 4096
WEIGHTED = 3


class Sums:
    """Sums of tensors of one size: plain, and three with weights of 1 and -1, which are alike on all devices.

    Two tensors that differ by d in root sum of squares differ by about d in each of them. The plain sum alone
    is that of many tensors; of large random ones often nearly so.

    Args:
        elements: of the tensors.
        device: where they are.

    Attributes:
        of: both.
    """

    def __init__(self, elements: int, device: torch.device) -> None:
        self.of = elements, device
        self._padding = -elements % _COLUMNS
        self._columns = _weights(_COLUMNS, device)
        self._rows = _weights(-(-elements // _COLUMNS), device)

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Root sum of squares, the sum, and the weighted sums; float64 (2 + `WEIGHTED`,), on the device."""
        flat = tensor.detach().flatten().double()
        table = F.pad(flat, (0, self._padding)).view(-1, _COLUMNS)
        sums = ((table @ self._columns) * self._rows).sum(0)
        return torch.cat((flat.square().sum().sqrt()[None], sums))


def _weights(count: int, device: torch.device) -> torch.Tensor:
    """One, and signs that follow no pattern; float64 (count, 1 + `WEIGHTED`)."""
    mixed = torch.arange(1, count + 1, device=device) * 0x9E3779B1
    mixed = (mixed ^ (mixed >> 16)) * 0x45D9F3B
    signs = [1 - 2 * ((mixed >> shift) & 1) for shift in range(16, 16 + 5 * WEIGHTED, 5)]
    return torch.stack([torch.ones_like(mixed), *signs], dim=1).double()
