"""A simulated host: its gangs and requests, event by event.

A request yields only at the end of a step, going on in another gang costs the profile's `regroup_s` and one
synchronous step, a gang that decodes cannot be disturbed, and everything is as slow as the busy workers make
it. Memory grows with what is waiting, not with what has been.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from distriray.routing.host_clock import HostClock, busy_workers
from distriray.routing.latency import LatencyModel
from distriray.routing.policy import HostPolicy, HostView, RequestView, Workers, moves
from distriray.routing.simulation.event_queue import EventQueue
from distriray.routing.simulation.fleet import SimulatedFleet
from distriray.routing.simulation.report import TraceReport


@dataclass(slots=True)
class _Segment:
    """A run of steps in one gang. Times are the host's own, except `began_s`.

    Attributes:
        began_s: when the gang was formed, in simulated time.
        first_s: when the first step begins.
        prepare_s: what came before it; None unless it is the first one of the image.
        slow: number of steps, at the start, that are synchronous.
        ends: number of steps after which it leaves.
        decoding: it has made its steps.
        next_s, then: the next event of this segment, and its time.
    """

    workers: Workers
    began_s: float
    first_s: float
    prepare_s: float | None
    slow: int
    sync_step_s: float
    step_s: float
    ends: int
    decoding: bool = False
    next_s: float = 0.0
    then: Then | None = None

    def boundary_s(self, steps: int) -> float:
        """The end of its step number `steps`."""
        return (
            self.first_s + min(steps, self.slow) * self.sync_step_s + max(0, steps - self.slow) * self.step_s
        )

    def steps_by(self, time_s: float) -> int:
        """Steps finished by `time_s`."""
        slow_end = self.boundary_s(self.slow)
        if time_s < slow_end:
            return max(0, int((time_s - self.first_s) / self.sync_step_s + 1e-9))
        return min(self.ends, self.slow + int((time_s - slow_end) / self.step_s + 1e-9))


@dataclass(slots=True)
class _Live:
    """A request that is not finished."""

    view: RequestView  # as of its last segment
    segment: _Segment | None = None
    version: int = 0
    yielding: bool = False


Then = Callable[[_Live, _Segment], None]
"""What is done next of a request and its segment. It holds neither, so that nothing outlives them."""


class SimulatedHost:
    """One host: it keeps requests, asks its policy, and does what real workers would.

    Args:
        model: what the policy believes. Segments teach it unless it is `truth` itself.
        truth: how long things take.
    """

    def __init__(
        self,
        events: EventQueue,
        policy: HostPolicy,
        fleet: SimulatedFleet,
        model: LatencyModel,
        truth: LatencyModel,
        report: TraceReport,
        draw: random.Random,
    ) -> None:
        self.events, self.policy, self.fleet = events, policy, fleet
        self.workers = tuple(range(fleet.workers))
        self.model, self.truth, self.report, self.draw = model, truth, report, draw
        self.live: dict[str, _Live] = {}
        self.host_clock = HostClock()
        self._busy = 0
        self._decisions = 0

    def submit(self, request: RequestView) -> None:
        """A request arrives."""
        self.live[request.id] = _Live(request)
        self.decide()

    def view(self) -> HostView:
        """The host as its policy sees it now."""
        # by way of a list: CPython makes a tuple of a generator by cutting a longer one, and every cut one
        # that is freed goes to a free list from which none is taken, so that memory would grow
        seen = [self._seen(live) for live in self.live.values()]
        return HostView(
            self.events.now_s, self.workers, self.fleet.gang_sizes, tuple(seen), self.policy.regroups
        )

    def decide(self) -> None:
        """Ask the policy, carry out what it says, and look again in a while."""
        self._decisions += 1
        if not self.live:
            return
        view = self.view()
        todo = moves(view, self.policy.plan(view, self.model))
        for name in todo.yields:
            self._ask_to_yield(self.live[name])
        for name, workers in todo.starts.items():
            self._start(self.live[name], workers)
        if self.policy.review_s is not None:
            decision = self._decisions
            self.events.at(self.events.now_s + self.policy.review_s, lambda: self._review(decision))

    def _review(self, decision: int) -> None:
        if decision == self._decisions:
            self.decide()

    def _seen(self, live: _Live) -> RequestView:
        segment, view = live.segment, live.view
        if segment is None:
            return view
        steps = segment.steps_by(self.host_clock.at(self.events.now_s))
        pinned = view.steps_done + steps >= view.steps_total
        return _with(view, view.steps_done + steps, segment.workers, pinned)

    def _start(self, live: _Live, workers: Workers) -> None:
        now, view = self.events.now_s, live.view
        times = self.truth.times(len(workers), *view.shape)
        noise = math.exp(self.draw.gauss(0.0, self.fleet.noise)) if self.fleet.noise else 1.0
        left = view.steps_total - view.steps_done
        warmup = times.warmup_steps if view.warmup_steps is None else view.warmup_steps
        warm = warmup - view.steps_done
        slow = min(left, max(warm, 1 if view.steps_done else 0))
        before = noise * (self.truth.profile.regroup_s if view.steps_done else times.prepare_s)
        live.segment = _Segment(
            workers=workers,
            began_s=now,
            first_s=self.host_clock.at(now) + before,
            prepare_s=None if view.steps_done else before,
            slow=slow,
            sync_step_s=times.sync_step_s * noise,
            step_s=times.step_s * noise,
            ends=left,
        )
        self.report.regroupings += view.steps_done > 0
        self._step_on(live, live.segment)
        self._keep_pace(self._busy_in(live.segment))

    def _ask_to_yield(self, live: _Live) -> None:
        segment = live.segment
        if segment is None or live.yielding:
            return
        live.yielding = True
        now = self.host_clock.at(self.events.now_s)
        done = segment.steps_by(now)
        at_boundary = done > 0 and segment.boundary_s(done) >= now - 1e-9
        if (steps := max(1, done if at_boundary else done + 1)) < segment.ends:
            segment.ends = steps
            self._step_on(live, segment)

    def _step_on(self, live: _Live, segment: _Segment) -> None:
        end = segment.boundary_s(segment.ends)
        self._schedule(live, segment, end, self._end_of_steps)

    def _schedule(self, live: _Live, segment: _Segment, host_s: float, then: Then) -> None:
        """Do `then` when it is `host_s` for the host, in place of what was scheduled."""
        live.version += 1
        version = live.version
        segment.next_s, segment.then = host_s, then
        self.events.at(
            self.host_clock.when(host_s), lambda: then(live, segment) if version == live.version else None
        )

    def _keep_pace(self, more: int) -> None:
        """Count `more` workers as busy, and let every gang run from now on at the pace that this allows."""
        self._busy += more
        if self.host_clock.change(self.truth.pace(self._busy), self.events.now_s):
            for live in self.live.values():
                if live.segment is not None and live.segment.then is not None:
                    self._schedule(live, live.segment, live.segment.next_s, live.segment.then)

    def _end_of_steps(self, live: _Live, segment: _Segment) -> None:
        view = live.view
        finished = view.steps_done + segment.ends >= view.steps_total
        decode = self.truth.times(len(segment.workers), *view.shape).decode_s
        if self.model is not self.truth:
            case = len(segment.workers), view.height, view.width, view.batch
            prepare_s, decode_s = segment.prepare_s, decode if finished else None
            self.model.observe(*case, segment.step_s, view.guided, view.besides, prepare_s, decode_s)
        if not finished:
            self._let_go(live, segment)
            live.view = _with(view, view.steps_done + segment.ends, None, False)
            self.decide()
            return
        before = self._busy_in(segment)
        segment.decoding = True
        self._keep_pace(self._busy_in(segment) - before)
        if decode > 0:
            end = self.host_clock.at(self.events.now_s) + decode
            self._schedule(live, segment, end, self._finish)
        else:
            self._finish(live, segment)

    def _finish(self, live: _Live, segment: _Segment) -> None:
        now, view, report = self.events.now_s, live.view, self.report
        self._let_go(live, segment)
        del self.live[view.id]
        report.latency.add(now - view.arrival_s)
        report.span_s = now
        report.met += view.deadline_s is not None and now <= view.deadline_s + 1e-9
        self.decide()

    def _let_go(self, live: _Live, segment: _Segment) -> None:
        self.report.worker_seconds += len(segment.workers) * (self.events.now_s - segment.began_s)
        live.segment, live.yielding = None, False
        live.version += 1
        self._keep_pace(-self._busy_in(segment))

    def _busy_in(self, segment: _Segment) -> int:
        return busy_workers(len(segment.workers), segment.decoding, self.fleet.decodes_together)


def _with(view: RequestView, steps_done: int, workers: Workers | None, pinned: bool) -> RequestView:
    """`view` with these fields changed; `dataclasses.replace` is too slow here."""
    # not all by name: CPython keeps tuples of 20 names that are freed, and takes none of them again
    return RequestView(
        view.id,
        view.height,
        view.width,
        batch=view.batch,
        steps_total=view.steps_total,
        steps_done=steps_done,
        arrival_s=view.arrival_s,
        deadline_s=view.deadline_s,
        priority=view.priority,
        gang_size=view.gang_size,
        max_gang=view.max_gang,
        workers=workers,
        prepared=steps_done > 0,
        pinned=pinned,
        guided=view.guided,
        unguided_steps=view.unguided_steps,
        fresh=view.fresh,
        warmup_steps=view.warmup_steps,
        adapters=view.adapters,
        besides=view.besides,
    )
