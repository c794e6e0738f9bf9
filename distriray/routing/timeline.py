"""The capacity of a host over the time ahead, and reservations in it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from distriray.routing.candidates import Candidate
from distriray.routing.capacity import Capacity


class Span(NamedTuple):
    """A gang of `size` from `start_s` to `end_s`."""

    start_s: float
    end_s: float
    size: int


class CapacityStep(NamedTuple):
    """The capacity from `start_s` on, until the next step."""

    start_s: float
    capacity: Capacity


@dataclass(frozen=True, slots=True)
class Reservation:
    """The gangs that would finish a request: its first (0: none at once), its end, and what they use."""

    first: int
    end_s: float
    worker_seconds: float
    spans: tuple[Span, ...]


class Timeline:
    """The capacity that is left, as a step function of time from now on."""

    def __init__(self, now_s: float, capacity: Capacity) -> None:
        self._starts = [now_s]
        self._capacities = [capacity]
        self._largest = [capacity.largest]  # gang that fits, for each step

    @classmethod
    def of(cls, steps: Sequence[CapacityStep], now_s: float) -> Timeline:
        """The capacity from `now_s` on, by `steps` in order of time, of which there is at least one."""
        current = next((step for step in reversed(steps) if step.start_s <= now_s), steps[0])
        timeline = cls(now_s, current.capacity.copy())
        for step in steps:
            if step.start_s > now_s:
                timeline._starts.append(step.start_s)
                timeline._capacities.append(step.capacity.copy())
                timeline._largest.append(step.capacity.largest)
        return timeline

    @property
    def steps(self) -> tuple[CapacityStep, ...]:
        """The step function, which changes with the timeline."""
        return tuple(map(CapacityStep, self._starts, self._capacities))

    def fit(self, candidate: Candidate, max_gang: int, hold_until: float = -inf) -> Reservation | None:
        """The reservation that takes, at any time, the largest gang up to `max_gang` that fits.

        It grows only where that repays the regrouping. Until `hold_until` it keeps its current gang; those
        workers must not also be counted as free. None when it would not end by its deadline.
        """
        starts, largest = self._starts, self._largest
        size = candidate.size
        left = 1.0  # the fraction of what it has to do
        debt = 0.0  # what is left to pay of a regrouping, in seconds
        used = 0.0
        spans: list[Span] = []
        last = len(starts) - 1
        due, fastest = candidate.deadline_s, min(candidate.left_s)
        for i, start in enumerate(starts):
            end = starts[i + 1] if i < last else inf
            while start < end:  # twice where the hold ends within this step of the timeline
                if start + left * fastest > due:
                    return None
                if start < hold_until:  # held: its own gang, whatever is free
                    at, until = candidate.index(size), min(end, hold_until)
                else:
                    at, until = candidate.index(min(max_gang, largest[i])), end
                if at < 0:  # nothing fits: it waits
                    size = 0
                    start = until
                    continue
                now = candidate.index(size) if size else -1
                if (
                    0 <= now < at
                    and left * (candidate.left_s[now] - candidate.left_s[at]) <= (candidate.regroup_s[at])
                ):  # a larger gang fits and does not repay the regrouping: it stays
                    at = now
                if candidate.sizes[at] != size:  # it starts, grows or shrinks
                    size, debt = candidate.sizes[at], candidate.regroup_s[at]
                need = debt + left * candidate.left_s[at]
                if start + need <= until:  # it ends here
                    if start + need > due:
                        return None
                    spans.append(Span(start, start + need, size))
                    first = spans[0].size if spans[0].start_s == starts[0] else 0
                    return Reservation(first, start + need, used + size * need, tuple(spans))
                spans.append(Span(start, until, size))  # it goes on after this step of the timeline
                used += size * (until - start)
                left -= max(0.0, until - start - debt) / candidate.left_s[at]
                debt = max(0.0, debt - (until - start))
                start = until
        return None

    def reserve(self, reservation: Reservation, since: float = -inf) -> None:
        """Remove what `reservation` uses after `since`."""
        for start, end, size in reservation.spans:
            if end > since:
                self.occupy(max(start, since), end, size)

    def occupy(self, start: float, end: float, size: int) -> None:
        """Remove a gang of `size` from `start` to `end`."""
        if start < end:
            first = self._cut(start)
            for i in range(first, self._cut(end)):
                self._capacities[i].take(size)
                self._largest[i] = self._capacities[i].largest

    def _cut(self, time: float) -> int:
        """Index of the step that starts at `time`, made if there is none."""
        i = bisect_right(self._starts, time) - 1
        if time == inf:
            return len(self._starts)
        if self._starts[i] == time:
            return i
        self._starts.insert(i + 1, time)
        self._capacities.insert(i + 1, self._capacities[i].copy())
        self._largest.insert(i + 1, self._largest[i])
        return i + 1
