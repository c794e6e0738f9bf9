"""Figures of a step."""

from __future__ import annotations

from dataclasses import dataclass

from distriray.parallel.stopwatch import Stopwatch


@dataclass(frozen=True)
class StepStatistics:
    """Figures of one step, or of several together.

    Attributes:
        whole: the time of the step on this rank.
        waiting: the time of it in which this rank waited for peers.
        waits: how often it did.
        bytes_sent: by this rank, to all peers.
        synchronous: whether all values were fresh.
    """

    whole: tuple[Stopwatch, ...] = ()
    waiting: tuple[Stopwatch, ...] = ()
    waits: int = 0
    bytes_sent: int = 0
    synchronous: bool = True

    def __add__(self, other: StepStatistics) -> StepStatistics:
        return StepStatistics(
            self.whole + other.whole,
            self.waiting + other.waiting,
            self.waits + other.waits,
            self.bytes_sent + other.bytes_sent,
            self.synchronous and other.synchronous,
        )

    @property
    def seconds(self) -> float:
        """Of the whole step; on a GPU this waits for its end."""
        return sum(watch.seconds for watch in self.whole)

    @property
    def wait_s(self) -> float:
        """Seconds of waiting: of a GPU's stream where there is one. Waits for the end of the step there."""
        return sum(waiting.seconds for waiting in self.waiting)
