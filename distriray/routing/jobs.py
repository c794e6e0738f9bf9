"""From the requests of a host to the few that a decision is about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from heapq import nsmallest
from math import inf, ldexp
from typing import NamedTuple

from .buddy import aligned_blocks
from .latency import LatencyModel
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


class _Ranked(NamedTuple):
    """A request and its place: by rank, then arrival, then id."""

    rank: float
    arrival_s: float
    id: str
    request: RequestView
    costs: Costs

    def job(self) -> Job:
        return job_of(self.request, self.costs)


@dataclass(frozen=True, slots=True)
class Scene:
    """The jobs of one decision, each in one of the three lists, with what comes first in front.

    Attributes:
        forced: keep their gang, or get their smallest, whatever comes.
        planned: have a deadline that can be met.
        others: those that run, and as many of those that wait as there are workers.
    """

    now_s: float
    workers: int
    forced: list[Job]
    planned: list[Job]
    others: list[Job]

    @property
    def all(self) -> list[Job]:
        """Every job, the most important first."""
        return [*self.forced, *self.planned, *self.others]


def scene_of(view: HostView, model: LatencyModel, planned: int, patience_s: float) -> Scene:
    """The jobs that matter now: pinned or passed over, due soonest, and first by response ratio.

    The response ratio is (wait + work) / work (Brinch Hansen, 1971), doubled for each unit of priority and
    for those that run, so that they go on. Of those passed over for `patience_s` the oldest is forced.
    """
    now, costs_of = view.now_s, costs_by_request(view, model)
    forced: list[Job] = []
    hopeful: list[_Ranked] = []
    rest: list[_Ranked] = []
    passed: _Ranked | None = None
    for r in view.requests:
        costs = costs_of(r)
        due = r.deadline_s
        if not costs.sizes:
            continue
        if r.pinned:
            forced.append(job_of(r, costs))
        elif due is not None and now + costs.soonest_s <= due + TOLERANCE_S:
            hopeful.append(_Ranked(due, r.arrival_s, r.id, r, costs))
        else:
            ratio = ldexp(1.0 + (now - r.arrival_s) / costs.work, r.priority + (r.workers is not None))
            rest.append(entry := _Ranked(-ratio, r.arrival_s, r.id, r, costs))
            if now - (r.arrival_s if due is None else due) > patience_s and (
                passed is None or entry[1:3] < passed[1:3]
            ):
                passed = entry
    soonest = nsmallest(planned + len(view.workers), hopeful, key=_place)
    chosen = soonest[:planned]
    if len(hopeful) > planned:  # later deadlines take what is left over, before those that have none
        last = _place(chosen[-1])
        later = [e for e in hopeful if e.request.workers is not None and _place(e) > last]
        later += [e for e in soonest[planned:] if e.request.workers is None]
        rest += [e._replace(rank=-inf) for e in later]
    if passed is not None:
        forced.append(passed.job())
        rest.remove(passed)
    waiting = (e for e in rest if e.request.workers is None)
    running = [e for e in rest if e.request.workers is not None]
    others = sorted(running + nsmallest(len(view.workers), waiting, key=_place), key=_place)
    return Scene(now, len(view.workers), forced, [e.job() for e in chosen], [e.job() for e in others])


def _place(entry: _Ranked) -> tuple[float, float, str]:
    return entry[:3]


def job_of(r: RequestView, costs: Costs) -> Job:
    """A request as the planner sees it."""
    return Job(
        r.id,
        costs.sizes,
        costs.left_s,
        costs.regroup_s,
        costs.error,
        len(r.workers) if r.workers else 0,
        inf if r.deadline_s is None else r.deadline_s + TOLERANCE_S,
        ldexp(1.0, r.priority),
        r.arrival_s,
        r.pinned,
    )


def costs_by_request(view: HostView, model: LatencyModel) -> Callable[[RequestView], Costs]:
    """A function that gives each request's costs on this host's healthy workers, worked out once a sort."""
    healthy = set(view.workers)
    blocks = aligned_blocks(max(healthy, default=-1) + 1, view.gang_sizes)
    whole = {len(block) for block in blocks if healthy.issuperset(block)}
    there = tuple(size for size in view.gang_sizes if size in whole)
    known: dict[tuple[object, ...], Costs] = {}

    def costs_of(r: RequestView) -> Costs:
        size = len(r.workers) if r.workers else 0
        key = (
            r.height,
            r.width,
            r.batch,
            r.steps_done,
            r.steps_total,
            r.gang_size,
            r.max_gang,
            r.prepared,
            size,
        )
        costs = known.get(key)
        if costs is None:
            costs = known[key] = _costs(r, size, there, model)
        return costs

    return costs_of


def _costs(r: RequestView, size: int, there: tuple[int, ...], model: LatencyModel) -> Costs:
    """Of the gangs worth having: the one it has, and those that no smaller one equals."""
    shape = (r.height, r.width, r.batch)
    sizes: list[int] = []
    left: list[float] = []
    for s in there:
        if s != size and not r.allows(s):
            continue
        seconds = max(1e-6, model.run_s(s, *shape, r.steps_done, r.steps_total, r.prepared))
        if s == size or not left or seconds < left[-1]:
            sizes.append(s)
            left.append(seconds)
    if not sizes:
        return Costs((), (), (), 0.0, inf, inf)
    moved = bool(r.steps_done or size)
    regroup = [model.regroup_s(s, *shape) if moved else 0.0 for s in sizes]
    soonest = min(t + (0.0 if s == size else c) for s, t, c in zip(sizes, left, regroup, strict=True))
    work = min(s * t for s, t in zip(sizes, left, strict=True))
    error = model.estimate(sizes[-1], *shape).error
    return Costs(tuple(sizes), tuple(left), tuple(regroup), error, soonest, work)
