"""Statistics of a stream in bounded memory."""

from __future__ import annotations

import math
from collections import Counter


class Quantiles:
    """Quantiles of positive numbers to 1 %, from counts in logarithmic bins (DDSketch, VLDB 2019).

    The bins between a microsecond and a year are 2,200, however many numbers were added.
    """

    GROWTH = math.log(1.02)
    LEAST = 1e-6

    def __init__(self) -> None:
        self._bins: Counter[int] = Counter()
        self.count = 0
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count one number."""
        self._bins[round(math.log(max(value, self.LEAST)) / self.GROWTH)] += 1
        self.count += 1
        self.total += value

    def at(self, share: float) -> float:
        """The number that `share` of all are not above; nan when there are none."""
        rank, seen = share * self.count, 0
        for bin_, count in sorted(self._bins.items()):
            seen += count
            if seen >= rank:
                return math.exp(bin_ * self.GROWTH)
        return math.nan

    @property
    def mean(self) -> float:
        """Exact mean; nan when there are none."""
        return self.total / self.count if self.count else math.nan
