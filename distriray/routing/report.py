"""Statistics of a stream in bounded memory."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field


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


@dataclass(slots=True)
class Report:
    """What a simulation or a trace on a real host came to. Times in seconds.

    Attributes:
        arrived, refused: requests; a refused one with a deadline counts as a deadline not met.
        with_deadline, met: requests with a deadline, and those of them that were finished by it.
        latency: from arrival to the image, of finished requests.
        worker_seconds: that gangs were held.
        regroupings: times that a request went on in another gang.
        span_s: from the start to the last image.
    """

    workers: int
    arrived: int = 0
    refused: int = 0
    with_deadline: int = 0
    met: int = 0
    worker_seconds: float = 0.0
    regroupings: int = 0
    span_s: float = 0.0
    latency: Quantiles = field(default_factory=Quantiles)

    def row(self) -> dict[str, float]:
        """The numbers of a table's row."""
        finished = max(1, self.latency.count)
        return {
            "deadlines met %": 100.0 * self.met / max(1, self.with_deadline),
            "p50 s": self.latency.at(0.50),
            "p95 s": self.latency.at(0.95),
            "p99 s": self.latency.at(0.99),
            "mean s": self.latency.mean,
            "GPU-s/image": self.worker_seconds / finished,
            "regroupings/image": self.regroupings / finished,
            "utilisation %": 100.0 * self.worker_seconds / max(1e-9, self.span_s * self.workers),
            "refused %": 100.0 * self.refused / max(1, self.arrived),
        }
