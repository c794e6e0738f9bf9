"""The choice of a host for a request, from what the hosts published a moment ago.

A host publishes its capacity over the time ahead. A router fits the request into each host's capacity and
takes the host where it would be done first. Hosts that are as good within what the model and the age of the
state leave uncertain are drawn from evenly, so that several routers that look at the same state do not all
run to the same host. Of these, those go first that hold most of the adapters which the request needs: to load
one takes less time than is uncertain, and none that is done sooner is left for it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from heapq import nsmallest
from math import inf
from typing import NamedTuple

from distriray.routing.candidates import Candidate, candidate_of, costs_by_request
from distriray.routing.capacity import Capacity
from distriray.routing.latency import LatencyModel
from distriray.routing.policy import HostView, RequestView
from distriray.routing.timeline import CapacityStep, Reservation, Timeline

CHOICES = 8  # hosts that are asked and compared for one request, however many there are
MORE_CHOICES = 4  # times as many before it is refused
PUBLISHED_REQUESTS = 24  # fitted one by one; those behind them count as backlog


@dataclass(frozen=True, slots=True)
class HostState:
    """The state that a host publishes when asked. Times are seconds on a clock that the fleet shares.

    Attributes:
        capacity_beside_deadlines: over time, beside the requests whose deadlines can be met, and beside those
            that run where nobody has to leave.
        capacity_beside_all: over time, beside all requests that were fitted one by one.
        backlog_s: seconds of all its workers that stand before a new request and that
            `capacity_beside_all` does not count.
        deadlines_backlog_s: those of them that `capacity_beside_deadlines` does not count either.
        waiting, max_waiting: its queue, and the bound at which it takes no more.
        workers, gang_sizes: those that it has, or will have once it is repaired, and what they can form.
        adapters: the names of those that a worker of it holds, or will hold.
    """

    host: str
    published_s: float
    workers: int
    gang_sizes: tuple[int, ...]
    capacity_beside_deadlines: tuple[CapacityStep, ...]
    capacity_beside_all: tuple[CapacityStep, ...]
    backlog_s: float
    deadlines_backlog_s: float
    waiting: int
    max_waiting: int
    adapters: frozenset[str] = frozenset()

    def holds(self, adapters: Iterable[str]) -> int:
        """Number of these adapters that it holds."""
        return sum(name in self.adapters for name in adapters)


@dataclass(frozen=True, slots=True)
class Route:
    """The destination of a request.

    Attributes:
        host: None when every queue is full or no host can form a gang for it.
        finish_s: one of two times: with a host, when the request would be done there; without, when a place
            in a queue may come free.
        meets: whether that is by its deadline, within what the model is sure of; a guess is sure of nothing.
        possible_s: with a deadline, the soonest that it could name and be done by: what misses its own goes
            behind all that a host has.
        error: relative, of the prediction for the gang that it would have there; 0 without a host.
        state: the chosen host's state with the request in it, for the router to go on with until the host
            publishes again.
    """

    host: str | None
    finish_s: float
    meets: bool
    possible_s: float = inf
    error: float = 0.0
    state: HostState | None = None


class _Option(NamedTuple):
    """A host that a request could go to, and how it would run there; times and `error` as in `Route`."""

    finish_s: float
    possible_s: float
    error: float
    state: HostState
    reservation: Reservation
    candidate: Candidate


def publish(
    host: str,
    view: HostView,
    model: LatencyModel,
    max_waiting: int = 1000,
    repaired: Sequence[int] = (),
    repair_s: float = 0.0,
) -> HostState:
    """A host's state, predicted from all its requests.

    Args:
        repaired: the workers that it will have in `repair_s` seconds, while some are being replaced.
    """
    now, steps = view.now_s, [CapacityStep(view.now_s, Capacity.of(view))]
    if repaired:
        view = replace(view, workers=tuple(repaired))
        steps.append(CapacityStep(now + repair_s, Capacity.of(view)))
    if not view.regroups:
        held = (r if r.workers is None else replace(r, gang_size=len(r.workers)) for r in view.requests)
        view = replace(view, requests=tuple(held))
    workers, capacity = len(view.workers), steps[-1].capacity
    costs_of = costs_by_request(view, model)
    known = [(r, costs) for r in view.requests if (costs := costs_of(r)).sizes]
    beside_deadlines, beside_all = Timeline.of(steps, now), Timeline.of(steps, now)
    with_deadline: list[Candidate] = []
    best_effort: list[Candidate] = []
    for r, costs in known:
        if r.workers is not None and not view.regroups:  # it goes before whoever comes
            with_deadline.append(candidate_of(r, costs))
        elif r.deadline_s is not None and now + costs.soonest_s <= r.deadline_s:
            with_deadline.append(candidate_of(r, costs, r.deadline_s))
        else:  # late, or without a deadline: it ends when it ends
            best_effort.append(candidate_of(r, costs))
    first = nsmallest(PUBLISHED_REQUESTS, with_deadline, lambda c: (not c.size, c.deadline_s, c.arrival_s))
    for candidate in first:
        reservation = _in_time(beside_deadlines, candidate) or _soonest(beside_deadlines, candidate)
        if reservation is not None:
            beside_deadlines.reserve(reservation)
            beside_all.reserve(reservation)
    second = nsmallest(PUBLISHED_REQUESTS - len(first), best_effort, lambda c: (not c.size, c.arrival_s))
    for candidate in second:
        reservation = beside_all.fit(candidate, candidate.size or candidate.sizes[0])
        if reservation is not None:
            beside_all.reserve(reservation)
    fitted = {candidate.id for candidate in (*first, *second)}
    behind = {r.id: costs.worker_seconds for r, costs in known if r.id not in fitted}
    due_behind = (behind.get(candidate.id, 0.0) for candidate in with_deadline)
    return HostState(
        host=host,
        published_s=now,
        workers=workers,
        gang_sizes=tuple(size for size, free in capacity.free.items() if free),
        capacity_beside_deadlines=beside_deadlines.steps,
        capacity_beside_all=beside_all.steps,
        backlog_s=sum(behind.values()) / max(1, workers),
        deadlines_backlog_s=sum(due_behind) / max(1, workers),
        waiting=sum(r.workers is None for r in view.requests),
        max_waiting=max_waiting,
    )


def route(
    states: Sequence[HostState],
    request: RequestView,
    now_s: float,
    model: LatencyModel,
    draw: random.Random,
    error_margin: float = 1.0,
) -> Route:
    """Choose a host for a request that has just come.

    Args:
        states: one of each host, as old as they are.
        draw: where ties are drawn from; seeded, it always chooses the same.
        error_margin: how many of the model's errors two predictions may lie apart and count as equal.
    """
    options = [option for state in states if (option := _option(state, request, now_s, model)) is not None]
    if not options:
        return Route(None, now_s + min((_drain_s(state) for state in states), default=inf), False)
    soonest = min(options, key=lambda option: option.finish_s)
    best = soonest.finish_s
    slack_s = error_margin * soonest.error * (best - now_s)

    def near(option: _Option) -> bool:
        return option.finish_s - best <= slack_s + max(0.0, now_s - option.state.published_s)

    good = [option for option in options if near(option)]
    most = max(option.state.holds(request.adapters) for option in good)
    finish_s, _, error, state, reservation, candidate = draw.choice(
        [option for option in good if option.state.holds(request.adapters) == most]
    )
    possible_s = min(option.possible_s for option in options)
    meets = request.deadline_s is None or not model.knows or best - slack_s <= request.deadline_s
    beside_deadlines = Timeline.of(state.capacity_beside_deadlines, now_s)
    beside_all = Timeline.of(state.capacity_beside_all, now_s)
    if candidate.deadline_s < inf:
        reservation = _in_time(beside_deadlines, candidate) or reservation
        beside_deadlines.reserve(reservation)
    beside_all.reserve(reservation)
    after = replace(
        state,
        capacity_beside_deadlines=beside_deadlines.steps,
        capacity_beside_all=beside_all.steps,
        waiting=state.waiting + 1,
        adapters=state.adapters.union(request.adapters),
    )
    return Route(state.host, finish_s, meets, possible_s, error, after)


def _option(state: HostState, request: RequestView, now_s: float, model: LatencyModel) -> _Option | None:
    """The request on the gang of a host where it is done first; None if it takes no more, or has no gang.

    One that cannot be done by its deadline has no more right to workers than one that has none.
    """
    if state.waiting >= state.max_waiting or not state.gang_sizes:
        return None
    empty = HostView(now_s, tuple(range(state.workers)), state.gang_sizes, (request,))
    costs = costs_by_request(empty, model)(request)
    if not costs.sizes:
        return None
    candidate, possible_s, due_s = candidate_of(request, costs), inf, request.deadline_s
    if due_s is not None:
        reservation = _soonest(Timeline.of(state.capacity_beside_deadlines, now_s), candidate)
        delay_s = state.deadlines_backlog_s
        possible_s = inf if reservation is None else reservation.end_s + delay_s
    if due_s is not None and possible_s <= due_s:
        candidate = replace(candidate, deadline_s=due_s)
    else:
        reservation = _soonest(Timeline.of(state.capacity_beside_all, now_s), candidate)
        delay_s = state.backlog_s
    if reservation is None:
        return None
    error = model.times(reservation.spans[-1].size, *request.shape).error
    return _Option(reservation.end_s + delay_s, possible_s, error, state, reservation, candidate)


def predicted_s(view: HostView, request: RequestView, model: LatencyModel) -> float:
    """Seconds until a request that comes now would be done on this host; infinite without a gang for it."""
    state = publish("", view, model, max_waiting=len(view.requests) + 1)
    found = route([state], request, view.now_s, model, random.Random(0))
    return inf if found.host is None else found.finish_s - view.now_s


def backlog_s(view: HostView, model: LatencyModel) -> float:
    """Seconds until everything in `view` would be done, were it spread evenly over its workers."""
    costs_of = costs_by_request(view, model)
    work = sum(costs.worker_seconds for r in view.requests if (costs := costs_of(r)).sizes)
    return work / max(1, len(view.workers))


def _in_time(timeline: Timeline, candidate: Candidate) -> Reservation | None:
    """A reservation on the smallest gang that meets the deadline; None when none does."""
    for size in candidate.sizes:
        reservation = timeline.fit(candidate, size)
        if reservation is not None:
            return reservation
    return None


def _soonest(timeline: Timeline, candidate: Candidate) -> Reservation | None:
    """The reservation that ends first, whether in time or not."""
    candidate = replace(candidate, deadline_s=inf)
    found = [fit for size in candidate.sizes if (fit := timeline.fit(candidate, size)) is not None]
    return min(found, key=lambda reservation: reservation.end_s, default=None)


def _drain_s(state: HostState) -> float:
    """About when a full queue has a place: its backlog over its length."""
    last = max(0.0, state.capacity_beside_all[-1].start_s - state.published_s) + state.backlog_s
    return max(0.1, last / max(1, state.waiting))
