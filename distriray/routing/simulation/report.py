"""Results of a run: deadlines met, latencies, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from distriray.routing.quantiles import Quantiles


@dataclass(slots=True)
class TraceReport:
    """Results of a trace, simulated or run on a real host. Times in seconds.

    Attributes:
        arrived, refused: requests; a refused one with a deadline counts as a deadline not met.
        with_deadline, met: requests with a deadline, and those of them that were finished by it.
        latency: from arrival to the image, of finished requests.
        worker_seconds: held by gangs.
        regroupings: number of times that a request went on in another gang.
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
