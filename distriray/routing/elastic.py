"""The elastic host policy: gangs that change at step boundaries so that deadlines are met.

Every request with a deadline that can still be met is poured into the free workers of the time ahead, in
some order, on the smallest gang that meets it; gangs may change on the way wherever workers come free. A
few orders are tried (earliest deadline first, cheapest first, then single exchanges, as in Moore's
algorithm for the fewest late jobs) and the best is kept, but only if it beats leaving everything as it is.
The workers that stay idle go to requests without a deadline and to late ones, by response ratio, and then
to the gangs that gain most.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import nsmallest
from math import inf

from .blocks import place
from .buddy import aligned_blocks
from .latency import LatencyModel
from .policy import HostView, Plan, RequestView
from .timeline import Job, Run, Timeline


@dataclass(frozen=True, slots=True)
class ElasticConfig:
    """How the policy weighs things.

    Attributes:
        review_s: decide anew at step boundaries at most this often.
        patience_s: how long a request may be passed over, after its arrival or, if it has one, its
            deadline, before it gets its smallest gang ahead of all others, the oldest first.
        planned: at most so many deadlines are planned for, the earliest first.
        exchanges: at most so many orders are tried beyond the first two.
        growth: seconds that a larger gang must save for each worker-second it costs more.
        thrift: met deadlines that a worker-second is worth, beyond what the request costs anyway.
        worth: met deadlines that a regrouping must win.
        gain: by how much more work per second justifies regrouping when it wins fewer.
    """

    review_s: float = 0.25
    patience_s: float = 60.0
    planned: int = 16
    exchanges: int = 6
    growth: float = 0.2
    thrift: float = 0.01
    worth: float = 0.05
    gain: float = 1.15


@dataclass(slots=True)
class _Outlook:
    """What an order of the deadlines comes to: its value, and how the requests that meet theirs run."""

    value: float
    runs: dict[str, Run]


@dataclass(frozen=True, slots=True)
class _Scene:
    """The jobs of one decision, each in one of the three lists, with what comes first in front."""

    now_s: float
    workers: int
    forced: list[Job]  # keep their gang, or get their smallest, whatever comes
    planned: list[Job]  # have a deadline that can be met
    others: list[Job]

    @property
    def all(self) -> list[Job]:
        return [*self.forced, *self.planned, *self.others]


class Elastic:
    """Meets the most deadlines with the fewest worker-seconds, and starves nobody (see the module)."""

    def __init__(self, config: ElasticConfig | None = None) -> None:
        self.config = config or ElasticConfig()

    @property
    def review_s(self) -> float | None:
        """Slack runs out and deadlines pass between events, so it looks again now and then."""
        return self.config.review_s

    def plan(self, view: HostView, model: LatencyModel) -> Plan:
        """See `HostPolicy.plan`."""
        scene = self._scene(view, jobs_of(view, model))
        best = self._search(scene)
        sizes = self._fill(scene, best, {})
        if all(j.size for j in scene.forced):
            calm = self._try(scene, scene.planned, calm=True)
            same = self._fill(scene, calm, {j.id: j.size for j in scene.all if j.size})
            gain = _pace(scene, sizes) / max(_pace(scene, same), 1e-9)
            if best.value <= calm.value + self.config.worth and gain <= self.config.gain:
                sizes = same
        return Plan(place(view, sizes))

    def _scene(self, view: HostView, jobs: list[Job]) -> _Scene:
        now, config = view.now_s, self.config
        hopeful = [j for j in jobs if not j.pinned and now + j.soonest_s() <= j.deadline_s < inf]
        planned = nsmallest(config.planned, hopeful, key=lambda j: (j.deadline_s, j.arrival_s, j.id))
        chosen = {j.id for j in planned}
        forced = [j for j in jobs if j.pinned]
        others = [j for j in jobs if not j.pinned and j.id not in chosen]
        passed = [j for j in others if now - j.since_s() > config.patience_s]
        if passed:
            forced.append(min(passed, key=lambda j: (j.arrival_s, j.id)))
            others.remove(forced[-1])
        # More than one for each worker cannot run.
        others = nsmallest(
            len(view.workers), others, key=lambda j: (-j.response_ratio(now), j.arrival_s, j.id)
        )
        return _Scene(now, len(view.workers), forced, planned, others)

    def _search(self, scene: _Scene) -> _Outlook:
        """The best of a bounded number of orders."""
        order, best = scene.planned, self._try(scene, scene.planned)
        cheap = sorted(scene.planned, key=lambda j: (j.least_worker_seconds() / j.weight, j.id))
        trials = [cheap]
        trials += [
            [j, *(k for k in order if k is not j)]
            for j in cheap[: self.config.exchanges]
            if j.id not in best.runs
        ]
        trials += [
            [*(k for k in order if k is not j), j]
            for j in cheap[-self.config.exchanges :]
            if j.id in best.runs
        ]
        for trial in trials:
            if len(best.runs) == len(scene.planned):
                break
            outlook = self._try(scene, trial)
            if outlook.value > best.value:
                best = outlook
        return best

    def _try(self, scene: _Scene, order: list[Job], calm: bool = False) -> _Outlook:
        """Pour jobs in this order, each on the smallest gang that meets its deadline; leave out the rest.

        When `calm`, everyone who runs keeps its gang until the first of them is done.
        """
        now = scene.now_s
        timeline = Timeline(now, scene.workers)
        until = -inf
        if calm:
            running = [j for j in scene.all if j.size]
            until = min((now + j.left_s[j.index(j.size)] for j in running), default=-inf)
            for job in running:
                timeline.reserve(now, until, job.size)
        for job in scene.forced:
            run = timeline.pour(job, job.size or job.sizes[0], until)
            if run is not None:
                timeline.take(run, until)
        outlook = _Outlook(0.0, {})
        for job in order:
            hold = until if job.size else -inf
            for at, size in enumerate(job.sizes):
                if now + job.left_s[at] > job.deadline_s and size != job.size:
                    continue
                run = timeline.pour(job, size, hold)
                if run is not None and run.end_s <= job.deadline_s:
                    timeline.take(run, hold)
                    outlook.runs[job.id] = run
                    extra = run.worker_seconds - job.worker_seconds(0)
                    outlook.value += job.weight * (1.0 - self.config.thrift * extra)
                    break
        return outlook

    def _fill(self, scene: _Scene, outlook: _Outlook, held: dict[str, int]) -> dict[str, int]:
        """Gang sizes for now: those held, what the outlook starts with, and all that idle workers can do."""
        sizes = dict(held)
        idle = scene.workers - sum(held.values())
        for job in scene.all:
            if job.id in sizes:
                continue
            if job.id in outlook.runs:
                size = outlook.runs[job.id].first
            elif job in scene.planned:
                size = 0
            else:
                size = job.size if job.pinned else job.sizes[0]
            if 0 < size <= idle:
                sizes[job.id] = size
                idle -= size
        self._grow([j for j in scene.all if j.id in sizes and not j.pinned], sizes, idle)
        return sizes

    def _grow(self, jobs: list[Job], sizes: dict[str, int], idle: int) -> None:
        """Give idle workers to the gangs that save most for them, where that repays the regrouping."""
        while idle > 0:
            best: tuple[float, Job, int] | None = None
            for job in jobs:
                at = job.index(sizes[job.id])
                if at + 1 == len(job.sizes) or job.sizes[at + 1] - job.sizes[at] > idle:
                    continue
                before, after = job.alone_s(at), job.alone_s(at + 1)
                saved = before - after
                cost = job.sizes[at + 1] * after - job.sizes[at] * before
                change = job.regroup_s[at + 1] if job.size == job.sizes[at] else 0.0
                if saved > max(change, self.config.growth * cost, 0.0):
                    ratio = saved / max(cost, 1e-9)
                    if best is None or ratio > best[0]:
                        best = (ratio, job, job.sizes[at + 1])
            if best is None:
                return
            _, job, size = best
            idle -= size - sizes[job.id]
            sizes[job.id] = size


def _pace(scene: _Scene, sizes: dict[str, int]) -> float:
    """Work done each second, in worker-seconds of the smallest gangs."""
    return sum(
        j.worker_seconds(0) / j.left_s[j.index(sizes[j.id])]
        for j in scene.all
        if j.id in sizes and j.left_s[0] > 0
    )


def jobs_of(view: HostView, model: LatencyModel) -> list[Job]:
    """The requests that may run on this host's healthy workers, as the planner sees them."""
    healthy = set(view.workers)
    blocks = aligned_blocks(max(healthy, default=-1) + 1, view.gang_sizes)
    whole = {len(block) for block in blocks if healthy.issuperset(block)}
    there = tuple(s for s in view.gang_sizes if s in whole)
    known: dict[tuple[object, ...], tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...]]] = {}
    jobs = []
    for r in view.requests:
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
        if costs[0]:
            deadline = inf if r.deadline_s is None else r.deadline_s
            jobs.append(Job(r.id, *costs, size, deadline, 2.0**r.priority, r.arrival_s, r.pinned))
    return jobs


def _costs(
    r: RequestView, size: int, there: tuple[int, ...], model: LatencyModel
) -> tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...]]:
    """Gangs worth having, ascending, with the seconds left on each and those of a regrouping to it."""
    shape = (r.height, r.width, r.batch)
    sizes: list[int] = []
    left: list[float] = []
    for s in there:
        seconds = model.run_s(s, *shape, r.steps_done, r.steps_total, r.prepared)
        if s == size or (r.allows(s) and not (left and seconds >= left[-1])):
            sizes.append(s)
            left.append(max(seconds, 1e-6))
    moved = bool(r.steps_done or size)
    regroup = tuple(model.regroup_s(s, *shape) if moved else 0.0 for s in sizes)
    return tuple(sizes), tuple(left), regroup
