"""Patience with a silent gang: nothing else notices compute that hangs where pings are answered."""

from __future__ import annotations

STALL_FACTOR = 30.0
"""How many times as long as anything took so far, or should take, the next sign of life may be awaited."""


class Patience:
    """The time until a segment must show that it goes on. Times are of one clock, in seconds.

    Args:
        floor_s: always waited for.
        expected_s: what its longest part should take, as far as it is known.
        now_s: when it began.
    """

    def __init__(self, floor_s: float, expected_s: float, now_s: float) -> None:
        self._floor_s = floor_s
        self._longest_s = expected_s
        self._heard_s = now_s

    @property
    def longest_s(self) -> float:
        """Seconds that anything took so far, or should take."""
        return self._longest_s

    @property
    def bound_s(self) -> float:
        """The longest wait for a sign of life, in seconds."""
        return max(self._floor_s, STALL_FACTOR * self._longest_s)

    def heard(self, now_s: float) -> None:
        """Note a sign of life: a step is done, or a rank is back."""
        self._longest_s = max(self._longest_s, now_s - self._heard_s)
        self._heard_s = now_s

    def left_s(self, now_s: float) -> float:
        """Seconds that it may still be silent; 0 once it is given up."""
        return max(0.0, self._heard_s + self.bound_s - now_s)
