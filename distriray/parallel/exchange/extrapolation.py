"""Extrapolation of what the step before has sent, to what layers read in its place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from distriray.config import Weight
from distriray.parallel.kernels.choice import kernels_of

FORGETTING = 0.7
"""What a step counts for in a fit, relative to the step after it."""


class Extrapolation(ABC):
    """What follows from what has arrived and from what had arrived the step before.

    Args:
        received: where values arrive.

    Attributes:
        readable: what layers read, of the shape of `received`, from `predict` until `remember`; then what had
            arrived the step before waits in its place.
    """

    def __init__(self, received: torch.Tensor) -> None:
        self._received = received
        self.readable = torch.zeros_like(received)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Its memory, which comes on top of what is received."""

    @abstractmethod
    def begin(self) -> None:
        """Forget the image before."""

    @abstractmethod
    def remember(self, read: bool) -> None:
        """Make the received values those of the step before: new ones arrive.

        Args:
            read: whether layers have read them, by `predict`.
        """

    @abstractmethod
    def predict(self, steps: int) -> None:
        """Make what layers read: what was received, unless enough steps of the image came before.

        Args:
            steps: that came before.
        """


class Constant(Extrapolation):
    """All of one weight w: last + w * (last - one before)."""

    def __init__(self, received: torch.Tensor, weight: float) -> None:
        super().__init__(received)
        self._weight = weight

    @property
    def nbytes(self) -> int:
        return self.readable.nbytes

    def begin(self) -> None:
        pass  # two steps of its own tell all

    def remember(self, read: bool) -> None:
        self.readable.copy_(self._received)

    def predict(self, steps: int) -> None:
        if steps > 1:
            self.readable.lerp_(self._received, 1.0 + self._weight)
        else:
            self.readable.copy_(self._received)


class Fitted(Extrapolation):
    """Each part of a weight of its own: that with which its changes would have followed from those before.

    It is the weight of least squares over the image's steps so far, from 0 to 1: the sum of d(t) * d(t - 1)
    over that of d(t - 1) ** 2, where d(t) is the change from one step to the next, and every step counts
    `FORGETTING` times as much as the one after it.

    Args:
        parts: numbers of each part; they are behind one another in `received`, row by row, and fill it.
    """

    def __init__(self, received: torch.Tensor, parts: Sequence[int]) -> None:
        super().__init__(received)
        self._change = torch.zeros_like(received)
        self._fit = kernels_of(received.device.type).Fit(received, parts)

    @property
    def nbytes(self) -> int:
        return self.readable.nbytes + self._change.nbytes

    def begin(self) -> None:
        sums = self._fit.sums
        with torch.inference_mode(sums.is_inference()):
            sums.zero_()

    def remember(self, read: bool) -> None:
        if not read:
            torch.sub(self._received, self.readable, out=self._change)
        self.readable.copy_(self._received)

    def predict(self, steps: int) -> None:
        if steps > 2:
            self._fit.extrapolate(self._received, self.readable, self._change, FORGETTING)
        else:
            self.remember(read=False)


def extrapolation_of(
    received: torch.Tensor, weight: Weight, parts: Sequence[int] = ()
) -> Extrapolation | None:
    """That of one kind of value; None where layers read what arrives.

    Args:
        parts: as of `Fitted`.
    """
    if weight == "fitted":
        return Fitted(received, parts)
    return Constant(received, weight) if weight else None
