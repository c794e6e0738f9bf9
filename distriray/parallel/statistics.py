"""Figures of a step."""

from __future__ import annotations

from dataclasses import dataclass

from distriray.parallel.exchange.step import Step
from distriray.parallel.stopwatch import Stopwatch


@dataclass(frozen=True)
class StepStatistics:
    """Figures of one step, or of several together.

    Attributes:
        whole: the time of the step on this rank.
        waiting: the time of it in which this rank waited for peers.
        waits: how often it did.
        bytes_sent: by this rank, to all peers.
        synchronous: whether all values were fresh, in a step before those that are short and whole in turn.
    """

    whole: tuple[Stopwatch, ...] = ()
    waiting: tuple[Stopwatch, ...] = ()
    waits: int = 0
    bytes_sent: int = 0
    synchronous: bool = True

    @classmethod
    def of(
        cls,
        whole: Stopwatch,
        step: Step | None,
        gathering: tuple[Stopwatch, ...],
        bytes_sent: int,
        in_turn: bool = False,
    ) -> StepStatistics:
        """Figures of a call.

        Args:
            step: what it exchanged in, if anything.
            gathering: the time in which it waited for what others predict.
            in_turn: as of `Reuse`.
        """
        waiting, waits = ((), 0) if step is None else (tuple(step.waiting), step.waits)
        synchronous = (step is None or not step.displaced) and not in_turn
        return cls((whole,), (*waiting, *gathering), waits + len(gathering), bytes_sent, synchronous)

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
