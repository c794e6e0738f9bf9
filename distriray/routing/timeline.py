"""The room on a host over the time ahead, and requests poured into it."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from math import inf

from .blocks import Room


@dataclass(slots=True)
class Job:
    """A request as the planner sees it: what is left of it on each gang it may have.

    Attributes:
        sizes: gangs it may have, ascending.
        left_s: seconds to its end on each of `sizes`, without regrouping.
        regroup_s: what a change to each of `sizes` costs, in seconds.
        error: relative, of all these times.
        size: of the gang it has, 0 while it waits.
        deadline_s: absolute; infinite when there is none.
        weight: what meeting the deadline is worth.
    """

    id: str
    sizes: tuple[int, ...]
    left_s: tuple[float, ...]
    regroup_s: tuple[float, ...]
    error: float
    size: int
    deadline_s: float
    weight: float
    arrival_s: float
    pinned: bool = False

    def index(self, size: int) -> int:
        """Position of the largest of its sizes within `size`; -1 when none is so small."""
        return bisect_right(self.sizes, size) - 1

    def worker_seconds(self, index: int) -> float:
        """Worker-seconds to its end on its size number `index`."""
        return self.sizes[index] * self.left_s[index]

    def least_worker_seconds(self) -> float:
        """Worker-seconds to its end on the gang that wastes least."""
        return min(size * left for size, left in zip(self.sizes, self.left_s, strict=True))

    def alone_s(self, index: int) -> float:
        """Seconds to its end on its size number `index`, with the regrouping if that is a change."""
        change = 0.0 if self.sizes[index] == self.size else self.regroup_s[index]
        return self.left_s[index] + change


@dataclass(frozen=True, slots=True)
class Run:
    """How a job would run: its first gang (0: not at once), when it ends, and what it uses."""

    first: int
    end_s: float
    worker_seconds: float
    spans: tuple[tuple[float, float, int], ...]


class Timeline:
    """The room that there is, as a step function of time from now on."""

    def __init__(self, now_s: float, room: Room) -> None:
        self.starts = [now_s]
        self.rooms = [room]
        self.free = [room.largest]

    def pour(self, job: Job, cap: int, hold_until: float = -inf) -> Run | None:
        """How `job` would run, from now on, always on the largest gang up to `cap` that fits.

        It grows only where that repays the regrouping. Until `hold_until` it keeps the gang it has, for
        which there must not be room as well. None when it would not end by its deadline.
        """
        starts, free = self.starts, self.free
        size = job.size
        left = 1.0  # the share of what it has to do
        debt = 0.0  # what is left to pay of a regrouping, in seconds
        used = 0.0
        spans: list[tuple[float, float, int]] = []
        last = len(starts) - 1
        due, fastest = job.deadline_s, min(job.left_s)
        for i, start in enumerate(starts):
            end = starts[i + 1] if i < last else inf
            while start < end:
                if start + left * fastest > due:
                    return None
                if start < hold_until:
                    at, until = job.index(size), min(end, hold_until)
                else:
                    at, until = job.index(min(cap, free[i])), end
                if at < 0:
                    size = 0
                    start = until
                    continue
                now = job.index(size) if size else -1
                if 0 <= now < at and left * (job.left_s[now] - job.left_s[at]) <= job.regroup_s[at]:
                    at = now
                if job.sizes[at] != size:
                    size, debt = job.sizes[at], job.regroup_s[at]
                need = debt + left * job.left_s[at]
                if start + need <= until:
                    if start + need > due:
                        return None
                    spans.append((start, start + need, size))
                    first = spans[0][2] if spans[0][0] == starts[0] else 0
                    return Run(first, start + need, used + size * need, tuple(spans))
                spans.append((start, until, size))
                used += size * (until - start)
                left -= max(0.0, until - start - debt) / job.left_s[at]
                debt = max(0.0, debt - (until - start))
                start = until
        return None

    def take(self, run: Run, since: float = -inf) -> None:
        """Remove what `run` uses after `since`."""
        for start, end, size in run.spans:
            if end > since:
                self.reserve(max(start, since), end, size)

    def reserve(self, start: float, end: float, size: int) -> None:
        """Remove a gang of `size` from `start` to `end`."""
        if start < end:
            first = self._cut(start)
            for i in range(first, self._cut(end)):
                self.rooms[i].take(size)
                self.free[i] = self.rooms[i].largest

    def _cut(self, time: float) -> int:
        """Index of the interval that starts at `time`, made if there is none."""
        i = bisect_right(self.starts, time) - 1
        if time == inf:
            return len(self.starts)
        if self.starts[i] == time:
            return i
        self.starts.insert(i + 1, time)
        self.rooms.insert(i + 1, self.rooms[i].copy())
        self.free.insert(i + 1, self.free[i])
        return i + 1
