"""From the requests of a host to the few that a decision is about."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from heapq import nsmallest
from math import inf, ldexp
from typing import NamedTuple

from .blocks import Room
from .latency import LatencyModel, Times
from .policy import HostView, RequestView
from .timeline import Job

TOLERANCE_S = 1e-6  # a deadline missed by rounding is met


class Costs(NamedTuple):
    """What requests of one sort cost; see `Job`."""

    sizes: tuple[int, ...]
    left_s: tuple[float, ...]
    regroup_s: tuple[float, ...]
    error: float
    soonest_s: float  # on the gang that is done first
    work: float  # worker-seconds on the gang that wastes least


Ranked = tuple[float, float, str, RequestView, Costs]
"""A request behind its rank, arrival and id, by which it is compared; ids differ."""


@dataclass(frozen=True, slots=True)
class Scene:
    """The jobs of one decision, each in one of the three lists, with what comes first in front.

    Attributes:
        room: on the host if nothing ran.
        forced: keep their gang, or get their smallest, whatever comes.
        planned: have a deadline that can be met.
        others: those that run, and as many of those that wait as could run: of each smallest size in turn.
    """

    now_s: float
    room: Room
    forced: list[Job]
    planned: list[Job]
    others: list[Job]

    @property
    def all(self) -> list[Job]:
        """Every job, the most important first."""
        return [*self.forced, *self.planned, *self.others]


def scene_of(view: HostView, model: LatencyModel, planned: int, patience_s: float, turn: bool) -> Scene:
    """The jobs that matter now: pinned or passed over, due soonest, and first by response ratio.

    The response ratio is (wait + work) / work (Brinch Hansen, 1971), doubled for each unit of priority and
    for those that run, so that they go on. When it is the `turn` of those passed over for `patience_s`, they
    are forced, the oldest first, as many as there are workers for.
    """
    now, costs_of = view.now_s, costs_by_request(view, model)
    forced: list[Job] = []
    hopeful: list[Ranked] = []
    rest: list[Ranked] = []
    passed: list[Ranked] = []
    for r in view.requests:
        costs = costs_of(r)
        due = r.deadline_s
        if not costs.sizes:
            continue
        if r.pinned:
            forced.append(job_of(r, costs))
        elif due is not None and now + costs.soonest_s <= due + TOLERANCE_S:
            hopeful.append((due, r.arrival_s, r.id, r, costs))
        else:
            ratio = ldexp(1.0 + (now - r.arrival_s) / costs.work, r.priority + (r.workers is not None))
            rest.append((-ratio, r.arrival_s, r.id, r, costs))
            if turn and now - (r.arrival_s if due is None else due) > patience_s:
                passed.append(rest[-1])
    chosen = nsmallest(planned, hopeful)
    if len(hopeful) > planned:  # later deadlines take what is left over, before those that have none
        rest += [(-inf, *e[1:]) for e in hopeful if e > chosen[-1]]
    room = Room.of(view)
    for e in nsmallest(len(view.workers), passed, key=lambda e: e[1:3]):
        if room.fits(e[4].sizes[0]):
            room.take(e[4].sizes[0])
            forced.append(job_of(e[3], e[4]))
            rest.remove(e)
    others = [e for e in rest if e[3].workers is not None]
    waiting: dict[int, list[Ranked]] = defaultdict(list)  # by the smallest gang that they may have
    for e in rest:
        if e[3].workers is None:
            waiting[e[4].sizes[0]].append(e)
    for size, like in waiting.items():
        others += nsmallest(len(view.workers) // size, like)
    others.sort()
    return Scene(
        now,
        Room.of(view),
        forced,
        [job_of(*e[3:], e[0] + TOLERANCE_S) for e in chosen],
        [job_of(*e[3:]) for e in others],
    )


def job_of(r: RequestView, costs: Costs, due: float = inf) -> Job:
    """A request as the planner sees it, to be finished by `due`."""
    return Job(
        r.id,
        costs.sizes,
        costs.left_s,
        costs.regroup_s,
        costs.error,
        len(r.workers) if r.workers else 0,
        due,
        ldexp(1.0, r.priority),
        r.arrival_s,
        r.pinned,
    )


def costs_by_request(view: HostView, model: LatencyModel) -> Callable[[RequestView], Costs]:
    """A function that gives each request's costs on this host's healthy workers, worked out once a sort."""
    there = [size for size, workers in Room.of(view).left.items() if workers]
    gangs: dict[tuple[int, int, int], list[tuple[int, Times]]] = {}
    known: dict[tuple[object, ...], Costs] = {}

    def costs_of(r: RequestView) -> Costs:
        size = len(r.workers) if r.workers else 0
        shape = (r.height, r.width, r.batch)
        key = (shape, r.steps_done, r.steps_total, r.gang_size, r.max_gang, r.prepared, size)
        costs = known.get(key)
        if costs is None:
            if shape not in gangs:
                gangs[shape] = [(s, model.times(s, *shape)) for s in there]
            costs = known[key] = _costs(r, size, gangs[shape])
        return costs

    return costs_of


def _costs(r: RequestView, size: int, gangs: list[tuple[int, Times]]) -> Costs:
    """Of the gangs worth having: the one it has, and those that no smaller one equals."""
    sizes: list[int] = []
    left: list[float] = []
    regroup: list[float] = []
    soonest = work = inf
    error = 0.0
    moved = bool(r.steps_done or size)
    for s, times in gangs:
        if s != size and not r.allows(s):
            continue
        seconds = max(1e-6, times.run_s(r.steps_done, r.steps_total, r.prepared))
        if s == size or not left or seconds < left[-1]:
            change = times.regroup_s if moved else 0.0
            sizes.append(s)
            left.append(seconds)
            regroup.append(change)
            soonest = min(soonest, seconds if s == size else seconds + change)
            work = min(work, s * seconds)
            error = times.error
    return Costs(tuple(sizes), tuple(left), tuple(regroup), error, soonest, work)
