"""The requests of a host as a planner sees them, and the few that a decision is about."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from heapq import nsmallest
from math import inf, ldexp
from typing import NamedTuple

from distriray.routing.capacity import Capacity
from distriray.routing.latency import Besides, LatencyModel, Times
from distriray.routing.policy import HostView, RequestView

TOLERANCE_S = 1e-6  # a deadline missed by rounding is met


@dataclass(slots=True)
class Candidate:
    """A request as a planner sees it: what is left of it on each gang that it may have.

    Attributes:
        sizes: gangs that it may have, ascending.
        left_s: seconds to its end on each of `sizes`, without regrouping.
        regroup_s: what a change to each of `sizes` costs, in seconds.
        error: relative, of all these times.
        size: of the gang that it has, 0 while it waits.
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

    def worker_seconds(self) -> float:
        """Worker-seconds to its end on the smallest gang."""
        return self.sizes[0] * self.left_s[0]

    def least_worker_seconds(self) -> float:
        """Worker-seconds to its end on the gang that wastes least."""
        return min(size * left for size, left in zip(self.sizes, self.left_s, strict=True))

    def time_to_finish_s(self, index: int) -> float:
        """Seconds to its end on its size number `index`, with the regrouping if that is a change."""
        change = 0.0 if self.sizes[index] == self.size else self.regroup_s[index]
        return self.left_s[index] + change


class Costs(NamedTuple):
    """Costs of requests of one sort; see `Candidate`.

    `soonest_s` is the time on the gang that is done first, with the regrouping; `worker_seconds` are those of
    the gang that wastes least.
    """

    sizes: tuple[int, ...]
    left_s: tuple[float, ...]
    regroup_s: tuple[float, ...]
    error: float
    soonest_s: float
    worker_seconds: float


Ranked = tuple[float, float, str, RequestView, Costs]
"""A request in an order: rank, the smallest first, then arrival, then id; ids differ.

Plain, because CPython reuses the memory of plain tuples, so that they set off no garbage collection: with
named tuples the slowest in a hundred decisions about 1000 requests took 35 ms, with these it takes 5.
"""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The requests that one decision is about, each in one of three lists, the most important first.

    Attributes:
        capacity: of the host if nothing ran.
        must_run: keep their gang (pinned), or get their smallest (passed over too long), whatever comes.
        with_deadline: have a deadline that can be met.
        best_effort: the others that run, and as many that wait as could run: of each smallest size in turn.
    """

    now_s: float
    capacity: Capacity
    must_run: list[Candidate]
    with_deadline: list[Candidate]
    best_effort: list[Candidate]

    @property
    def all(self) -> list[Candidate]:
        """Every candidate, the most important first."""
        return [*self.must_run, *self.with_deadline, *self.best_effort]


def select_candidates(
    view: HostView, model: LatencyModel, max_planned: int, patience_s: float, starved_turn: bool
) -> Candidates:
    """The requests that matter now: pinned or passed over, due soonest, and first by response ratio.

    The response ratio is (wait + work) / work (Brinch Hansen, 1971), doubled for each unit of priority and
    for those that run, so that they go on. In a `starved_turn` those passed over for `patience_s` must run,
    the oldest first, as many as there are workers for.
    """
    now, costs_of = view.now_s, costs_by_request(view, model)
    must_run: list[Candidate] = []
    feasible: list[Ranked] = []
    rest: list[Ranked] = []
    passed_over: list[Ranked] = []
    for r in view.requests:
        costs = costs_of(r)
        due = r.deadline_s
        if not costs.sizes:
            continue
        if r.pinned:
            must_run.append(candidate_of(r, costs))
        elif due is not None and now + costs.soonest_s <= due + TOLERANCE_S:
            feasible.append((due, r.arrival_s, r.id, r, costs))
        else:
            wait_s = now - r.arrival_s
            ratio = ldexp(1.0 + wait_s / costs.worker_seconds, r.priority + (r.workers is not None))
            rest.append((-ratio, r.arrival_s, r.id, r, costs))
            if starved_turn and now - (r.arrival_s if due is None else due) > patience_s:
                passed_over.append(rest[-1])
    planned = nsmallest(max_planned, feasible)
    if len(feasible) > max_planned:  # later deadlines take what is left over, before those that have none
        rest += [(-inf, *ranked[1:]) for ranked in feasible if ranked > planned[-1]]
    capacity = Capacity.of(view)
    for ranked in nsmallest(len(view.workers), passed_over, key=_arrival):
        *_, request, costs = ranked
        if capacity.fits(costs.sizes[0]):
            capacity.take(costs.sizes[0])
            must_run.append(candidate_of(request, costs))
            rest.remove(ranked)
    best_effort: list[Ranked] = []
    waiting: dict[int, list[Ranked]] = defaultdict(list)  # by the smallest gang that they may have
    for ranked in rest:
        _, _, _, request, costs = ranked
        (waiting[costs.sizes[0]] if request.workers is None else best_effort).append(ranked)
    for size, alike in waiting.items():
        best_effort += nsmallest(len(view.workers) // size, alike)
    best_effort.sort()
    return Candidates(
        now_s=now,
        capacity=Capacity.of(view),
        must_run=must_run,
        with_deadline=[candidate_of(r, costs, due + TOLERANCE_S) for due, _, _, r, costs in planned],
        best_effort=[candidate_of(r, costs) for *_, r, costs in best_effort],
    )


def _arrival(ranked: Ranked) -> tuple[float, str]:
    _, arrival_s, name, _, _ = ranked
    return arrival_s, name


def candidate_of(request: RequestView, costs: Costs, deadline_s: float = inf) -> Candidate:
    """A request as a planner sees it, to be finished by `deadline_s`."""
    return Candidate(
        id=request.id,
        sizes=costs.sizes,
        left_s=costs.left_s,
        regroup_s=costs.regroup_s,
        error=costs.error,
        size=len(request.workers) if request.workers else 0,
        deadline_s=deadline_s,
        weight=ldexp(1.0, request.priority),
        arrival_s=request.arrival_s,
        pinned=request.pinned,
    )


def costs_by_request(view: HostView, model: LatencyModel) -> Callable[[RequestView], Costs]:
    """A function that gives each request's costs on this host's healthy workers, computed once a sort."""
    available = [size for size, workers in Capacity.of(view).free.items() if workers]
    gangs: dict[tuple[int, int, int, bool, bool, Besides], list[tuple[int, Times]]] = {}
    known: dict[tuple[object, ...], Costs] = {}

    def costs_of(r: RequestView) -> Costs:
        size = len(r.workers) if r.workers else 0
        shape = r.shape
        steps = r.steps_done, r.steps_total, r.unguided_steps
        key = (shape, steps, r.gang_size, r.max_gang, r.prepared, size)
        costs = known.get(key)
        if costs is None:
            if shape not in gangs:
                gangs[shape] = [(s, model.times(s, *shape)) for s in available]
            costs = known[key] = _costs(r, size, gangs[shape])
        return costs

    return costs_of


def _costs(r: RequestView, size: int, gangs: list[tuple[int, Times]]) -> Costs:
    """The costs on the gangs worth having: the one it has, and those that no smaller one equals."""
    sizes: list[int] = []
    left: list[float] = []
    regroup: list[float] = []
    soonest_s = worker_seconds = inf
    error = 0.0
    moved = bool(r.steps_done or size)
    for s, times in gangs:
        if s != size and not r.allows(s):
            continue
        seconds = max(1e-6, r.left_s(times))
        if s == size or not left or seconds < left[-1]:
            change = times.regroup_s if moved else 0.0
            sizes.append(s)
            left.append(seconds)
            regroup.append(change)
            soonest_s = min(soonest_s, seconds if s == size else seconds + change)
            worker_seconds = min(worker_seconds, s * seconds)
            error = times.error
    return Costs(
        sizes=tuple(sizes),
        left_s=tuple(left),
        regroup_s=tuple(regroup),
        error=error,
        soonest_s=soonest_s,
        worker_seconds=worker_seconds,
    )
