"""A host's estimate of its own speed, corrected by every segment."""

from __future__ import annotations

import time
from typing import NamedTuple

from distriray.gang.job import Job
from distriray.routing.host_clock import HostClock
from distriray.routing.latency import LatencyModel
from distriray.routing.profile import Profile


class Moment(NamedTuple):
    """The same moment on the monotonic clock and in the host's own time (`HostClock`), in seconds."""

    clock_s: float
    host_s: float


class Speed:
    """A latency model with the host's own time, which is told how many workers are busy."""

    def __init__(self, profile: Profile) -> None:
        self.model = LatencyModel(profile)
        self._time = HostClock(time.monotonic())

    def now(self) -> Moment:
        clock_s = time.monotonic()
        return Moment(clock_s, self._time.at(clock_s))

    def busy(self, workers: int) -> None:
        """From now on so many workers are at work."""
        self._time.change(self.model.pace(workers), time.monotonic())

    def learn(self, job: Job, began: Moment) -> None:
        """From the last segment of `job`, which began then and has just ended."""
        segment, view, now = job.segments[-1], job.view(), self.now()
        case = len(segment.workers), view.height, view.width, view.batch
        guided = view.guided
        if guided and (end := view.steps_total - view.unguided_steps) < segment.last_step:
            if segment.first_step < end:
                return  # a mean of steps with guidance and without is neither's
            guided = False
        in_part = any(each.scale and (each.start, each.end) != (0.0, 1.0) for each in job.request.control)
        if in_part and (segment.first_step, segment.last_step) != (0, view.steps_total):
            return  # nor is a part of the steps what all are on the average
        step_s = segment.stale_step_s
        if step_s is None and segment.fresh_step_s is not None:  # a lone worker has no other
            times = self.model.times(*case, guided, besides=view.besides)
            step_s = segment.fresh_step_s * times.step_s / times.sync_step_s
        if step_s is not None:
            full = (now.host_s - began.host_s) / (now.clock_s - began.clock_s)
            self.model.observe(*case, step_s * full, guided, view.besides)
