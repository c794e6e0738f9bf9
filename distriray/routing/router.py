"""Which host a request goes to, from what the hosts published a moment ago.

A host publishes how many of its workers are free over the time ahead. A router pours the request into each
host's free time and takes the host where it would be done first. Hosts that are as good within what the
model and the age of the state leave uncertain are drawn from evenly, so that several routers that look at
the same state do not all run to the same host.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import nsmallest
from math import inf

from .blocks import Room
from .jobs import costs_by_request, job_of
from .latency import LatencyModel
from .policy import HostView, RequestView
from .timeline import Job, Run, Timeline

Steps = tuple[tuple[float, Room], ...]
PUBLISHED_JOBS = 24  # poured one by one; what is behind them counts as work


@dataclass(frozen=True, slots=True)
class HostState:
    """What a host publishes after each decision. Times are seconds on a clock that the fleet shares.

    Attributes:
        firm: the room over time, as (from, room), beside requests whose deadlines can be met.
        full: the same beside everything it has.
        backlog_s: seconds of all its workers that stand before a new request and are not in `full`.
        waiting, max_waiting: its queue, and the bound at which it takes no more.
        gang_sizes: those that its healthy workers can form.
    """

    host: str
    published_s: float
    workers: int
    gang_sizes: tuple[int, ...]
    firm: Steps
    full: Steps
    backlog_s: float = 0.0
    waiting: int = 0
    max_waiting: int = 1000


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes.

    Attributes:
        host: None when every queue is full or no host can form a gang for it.
        finish_s: when it would be done there; with no host, when a place in a queue may come free.
        meets: whether that is by its deadline, within what the model is sure of.
        state: the chosen host's state with the request in it, for the router to go on with until the host
            publishes again.
    """

    host: str | None
    finish_s: float
    meets: bool
    state: HostState | None = None


def publish(host: str, view: HostView, model: LatencyModel, max_waiting: int = 1000) -> HostState:
    """A host's state, predicted from everything it has."""
    now, workers, room = view.now_s, len(view.workers), Room.of(view)
    costs_of = costs_by_request(view, model)
    known = [(r, costs) for r in view.requests if (costs := costs_of(r)).sizes]
    firm, full = Timeline(now, room.copy()), Timeline(now, room.copy())
    hopeful: list[Job] = []
    rest: list[Job] = []
    for r, costs in known:
        if r.deadline_s is not None and now + costs.soonest_s <= r.deadline_s:
            hopeful.append(job_of(r, costs, r.deadline_s))
        else:  # late, or without a deadline: it ends when it ends
            rest.append(job_of(r, costs))
    first = nsmallest(PUBLISHED_JOBS, hopeful, key=lambda j: (not j.size, j.deadline_s, j.arrival_s))
    for job in first:
        run = _fit(firm, job) or _quickest(firm, job)
        if run is not None:
            firm.take(run)
            full.take(run)
    second = nsmallest(PUBLISHED_JOBS - len(first), rest, key=lambda j: (not j.size, j.arrival_s))
    for job in second:
        run = full.pour(job, job.size or job.sizes[0])
        if run is not None:
            full.take(run)
    poured = {j.id for j in (*first, *second)}
    behind = sum(costs.work for r, costs in known if r.id not in poured)
    waiting = sum(r.workers is None for r in view.requests)
    sizes = tuple(size for size, left in room.left.items() if left)
    return HostState(
        host, now, workers, sizes, _steps(firm), _steps(full), behind / max(1, workers), waiting, max_waiting
    )


def route(
    states: Sequence[HostState],
    request: RequestView,
    now_s: float,
    model: LatencyModel,
    draw: random.Random,
    caution: float = 1.0,
) -> Route:
    """Choose a host for a request that has just come.

    Args:
        states: one of each host, as old as they are.
        draw: where ties are drawn from; seeded, it always chooses the same.
        caution: how many of the model's errors two predictions may lie apart and count as equal.
    """
    options: list[tuple[float, HostState, Run, Job]] = []
    for state in states:
        if state.waiting >= state.max_waiting or not state.gang_sizes:
            continue
        empty = HostView(now_s, tuple(range(state.workers)), state.gang_sizes, (request,))
        costs = costs_by_request(empty, model)(request)
        if not costs.sizes:
            continue
        urgent = request.deadline_s is not None
        job = job_of(request, costs, inf if request.deadline_s is None else request.deadline_s)
        timeline = _timeline(state.firm if urgent else state.full, now_s)
        run = _quickest(timeline, job)
        if run is not None:
            delay = 0.0 if urgent else state.backlog_s
            options.append((run.end_s + delay, state, run, job))
    if not options:
        return Route(None, now_s + min((_drain_s(state) for state in states), default=inf), False)
    best = min(end for end, *_ in options)
    error = model.estimate(1, request.height, request.width, request.batch).error

    def near(end: float, state: HostState) -> bool:
        return end - best <= caution * error * (best - now_s) + max(0.0, now_s - state.published_s)

    end, state, run, job = draw.choice([option for option in options if near(option[0], option[1])])
    meets = request.deadline_s is None or best - caution * error * (best - now_s) <= request.deadline_s
    firm, full = _timeline(state.firm, now_s), _timeline(state.full, now_s)
    if request.deadline_s is not None:
        run = _fit(firm, job) or run
        firm.take(run)
    full.take(run)
    after = replace(state, firm=_steps(firm), full=_steps(full), waiting=state.waiting + 1)
    return Route(state.host, end, meets, after)


def predicted_s(view: HostView, request: RequestView, model: LatencyModel) -> float:
    """Seconds until a request that comes now would be done on this host; infinite without a gang for it."""
    state = publish("", view, model, max_waiting=len(view.requests) + 1)
    found = route([state], request, view.now_s, model, random.Random(0))
    return inf if found.host is None else found.finish_s - view.now_s


def backlog_s(view: HostView, model: LatencyModel) -> float:
    """Seconds until everything in `view` would be done, were it spread evenly over its workers."""
    costs_of = costs_by_request(view, model)
    work = sum(costs.work for r in view.requests if (costs := costs_of(r)).sizes)
    return work / max(1, len(view.workers))


def _fit(timeline: Timeline, job: Job) -> Run | None:
    """On the smallest gang that meets its deadline."""
    for size in job.sizes:
        run = timeline.pour(job, size)
        if run is not None:
            return run
    return None


def _quickest(timeline: Timeline, job: Job) -> Run | None:
    """On as many workers as it can use, whether in time or not."""
    job = replace(job, deadline_s=inf)
    runs = [run for size in job.sizes if (run := timeline.pour(job, size)) is not None]
    return min(runs, key=lambda run: run.end_s, default=None)


def _steps(timeline: Timeline) -> Steps:
    return tuple(zip(timeline.starts, timeline.rooms, strict=True))


def _timeline(steps: Steps, now_s: float) -> Timeline:
    """The room that `steps` say there is from `now_s` on."""
    at_once = next((room for start, room in reversed(steps) if start <= now_s), steps[0][1])
    timeline = Timeline(now_s, at_once.copy())
    for start, room in steps:
        if start > now_s:
            timeline.starts.append(start)
            timeline.rooms.append(room.copy())
            timeline.free.append(room.largest)
    return timeline


def _drain_s(state: HostState) -> float:
    """About when a full queue has a place: its work over its length."""
    last = max(0.0, state.full[-1][0] - state.published_s) + state.backlog_s
    return max(0.1, last / max(1, state.waiting))
