"""The kernels of a device, of what torch has no fast way for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch

from distriray.parallel.kernels import plain
from distriray.parallel.kernels.rows_around import RowsAround

log = logging.getLogger(__name__)


class FittedWeights(Protocol):
    """Weights of extrapolation, one for each part of what is received, fitted to an image's steps.

    Attributes:
        sums: what is known of the image's steps, float32; zeros if nothing is.
    """

    sums: torch.Tensor

    def extrapolate(
        self, received: torch.Tensor, before: torch.Tensor, change: torch.Tensor, forgetting: float
    ) -> None:
        """Make what follows from the values received, each part by the weight of least squares so far.

        That is the sum over steps of d(t) * d(t - 1), over that of d(t - 1) ** 2, from 0 to 1, where d(t) is
        the change from one step to the next.

        Args:
            received: of the place, shape and dtype that the weights were made for.
            before: what had been received the step before, of the same shape and dtype, contiguous; written:
                received + weight * d(t).
            change: d(t - 1), like `before`; written: d(t).
            forgetting: what a step counts for, relative to the step after it.
        """


class Kernels(Protocol):
    """A group norm in two halves, between which ranks swap statistics; changes in few bits; extrapolation."""

    def Fit(self, received: torch.Tensor, parts: Sequence[int]) -> FittedWeights:
        """Weights that know of no step.

        Args:
            received: where values arrive, (rows, numbers), contiguous rows.
            parts: numbers of each part; they are behind one another, row by row, and fill `received`.
        """

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
        around: RowsAround | None = None,
    ) -> torch.Tensor:
        """`input` normalized by the merged statistics of all ranks, scaled and shifted, in its dtype.

        Args:
            input: (batch, channels, ...).
            statistics: float32 (ranks, batch, groups, 2), means and variances; a variance below 0 counts as
                0 where there are shares.
            shares: float32 (ranks, 1, 1), each rank's share of the elements; None where the one row of the
                statistics is of the whole.
            weight, bias: (channels,).
            around: rows that are normalized too, and are then around it, as zeros are where the image ends.
        """

    def encode(self, values: torch.Tensor, known: torch.Tensor, bits: int) -> torch.Tensor:
        """The change from `known` to `values` in few bits, which is added to `known`.

        Runs of `few_bits.GROUP` numbers share a scale. Whoever decodes the message into the same `known` has
        the same bits afterwards, whichever device's kernels do it.

        Args:
            values: any shape and floating dtype.
            known: of the same shape and dtype, contiguous.
            bits: of a number, 2, 4 or 8.

        Returns:
            The message, uint8 of `few_bits.message_bytes`: of each group its scale, a bfloat16, and its
            numbers, several a byte.
        """

    def decode(
        self, message: torch.Tensor, known: torch.Tensor, bits: int, into: torch.Tensor | None = None
    ) -> None:
        """Add the change that `encode` has made a message of.

        Args:
            message, bits: as there.
            known: written.
            into: where the sum goes too, of the same shape and dtype.
        """


@cache
def kernels_of(device_type: str) -> Kernels:
    """The kernels for tensors of a type of device: Triton's on GPUs that it can serve, torch's elsewhere."""
    if device_type != "cuda":
        return plain
    try:
        from distriray.parallel.kernels import fused

        fused.group_statistics(torch.zeros((1, 1, 1), device=device_type), 1)
    except torch.OutOfMemoryError:  # which says nothing of Triton, and may be over when this is asked again
        raise
    except Exception as error:  # no triton, no C compiler for its launchers, a GPU that is too old
        log.warning(
            "group norms, changes in few bits and extrapolation launch 10 to 20 kernels each instead of 2 or "
            "3, because Triton does not work here: %s: %s",
            type(error).__name__,
            error,
        )
        return plain
    return fused
