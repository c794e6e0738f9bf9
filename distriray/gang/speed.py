"""A host's estimate of its own speed, corrected by every segment."""

from __future__ import annotations

import time
from typing import NamedTuple

from distriray.gang.job import Job
from distriray.gang.segment_result import SegmentResult
from distriray.results import Segment
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

    def learn(self, job: Job, result: SegmentResult, began: Moment) -> None:
        """From the last segment of `job`, which began then and has just ended with `result`."""
        segment, view, now = job.segments[-1], job.view(), self.now()
        case = len(segment.workers), view.height, view.width, view.batch
        in_part = any(each.scale and (each.start, each.end) != (0.0, 1.0) for each in job.request.control)
        if in_part and (segment.first_step, segment.last_step) != (0, view.steps_total):
            return  # a part of the steps is not what all are on the average
        guidance_ends = view.steps_total - view.unguided_steps
        guided = view.guided and segment.first_step < guidance_ends
        step_s = segment.stale_step_s
        if guided and guidance_ends < segment.last_step:
            step_s = None  # a mean of steps with guidance and without is neither's
        elif step_s is None and segment.fresh_step_s is not None:  # a lone worker has no other
            times = self.model.times(*case, guided, besides=view.besides)
            step_s = segment.fresh_step_s * times.step_s / times.sync_step_s
        prepare_s, decode_s = _ends(segment, result)
        full = (now.host_s - began.host_s) / (now.clock_s - began.clock_s)
        step_s, prepare_s, decode_s = (
            None if seconds is None else seconds * full for seconds in (step_s, prepare_s, decode_s)
        )
        self.model.observe(*case, step_s, guided, view.besides, prepare_s, decode_s)


def _ends(segment: Segment, result: SegmentResult) -> tuple[float | None, float | None]:
    """Seconds before the first step of an image, sending the gang off and its result back included, and those
    behind its last step; None where the segment does not have them."""
    if result.interrupted:
        return None, None
    ranks = result.worked
    first = ranks[0]
    on_the_way_s = segment.seconds - (first.left_at - first.formed_at) - first.decode_s
    # All wait for the last one, since who has read a text before does not read it again.
    ready_s = max(rank.adapters_s + rank.prepare_s for rank in ranks) - max(rank.adapters_s for rank in ranks)
    prepare_s = on_the_way_s + ready_s if segment.first_step == 0 else None
    return prepare_s, None if result.finished is None else first.decode_s
