"""Group norm of one rank's rows, by the kernels of its device."""

from __future__ import annotations

import logging
from functools import cache
from typing import Protocol

import torch

from distriray.parallel.kernels import plain

log = logging.getLogger(__name__)


class GroupNormKernels(Protocol):
    """The two halves of a group norm: between them, ranks swap statistics."""

    def group_statistics(
        self, input: torch.Tensor, groups: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean and biased variance of each group.

        Args:
            input: (batch, channels, ...), of any floating dtype.
            out: where they go, contiguous float32 (batch, groups, 2); a new tensor if None.

        Returns:
            `out`.
        """

    def normalize(
        self,
        input: torch.Tensor,
        statistics: torch.Tensor,
        shares: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        """`input` normalized by the merged statistics of all ranks, scaled and shifted, in its dtype.

        Args:
            input: (batch, channels, ...).
            statistics: float32 (ranks, batch, groups, 2), means and variances; a variance below 0 counts as
                0 where there are shares.
            shares: float32 (ranks, 1, 1), each rank's share of the elements; None where the one row of the
                statistics is of the whole.
            weight, bias: (channels,).
        """


@cache
def group_norm_kernels(device_type: str) -> GroupNormKernels:
    """The kernels for tensors of a type of device: Triton's on GPUs that it can serve, torch's elsewhere."""
    if device_type != "cuda":
        return plain
    try:
        from distriray.parallel.kernels import fused

        fused.group_statistics(torch.zeros((1, 1, 1), device=device_type), 1)
    except Exception as error:  # no triton, no C compiler for its launchers, a GPU that is too old
        log.warning(
            "group norms launch some 20 kernels each instead of 3, because Triton does not work here: %s: %s",
            type(error).__name__,
            error,
        )
        return plain
    return fused
