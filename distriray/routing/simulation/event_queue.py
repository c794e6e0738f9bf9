"""Simulated time."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count

Event = tuple[float, int, Callable[[], None]]
"""A time, the number of the event, which decides between equal times, and what happens."""


class EventQueue:
    """Simulated time and the events that are still to come."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._numbers = count()
        self._events: list[Event] = []

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Do `action` at `time_s`; equal times go in the order of the calls."""
        heappush(self._events, (time_s, next(self._numbers), action))

    def run(self) -> None:
        """Let everything happen, until no event is left."""
        while self._events:
            self.now_s, _, action = heappop(self._events)
            action()
