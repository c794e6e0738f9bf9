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
from math import inf

from ..blocks import Room, place
from ..jobs import Scene, scene_of
from ..latency import LatencyModel
from ..policy import HostView, Plan
from ..timeline import Job, Run, Timeline


@dataclass(frozen=True, slots=True)
class ElasticConfig:
    """How the policy weighs things.

    Attributes:
        review_s: decide anew at step boundaries at most this often.
        patience_s: how long a request may be passed over, after its arrival or, if it has one, its
            deadline, before it has a turn: of every `turn_s` seconds a `share` goes to such requests, the
            oldest first, each on its smallest gang.
        planned: at most so many deadlines are planned for, the earliest first.
        exchanges: at most so many orders are tried beyond the first two.
        caution: how many of the latency model's errors a gang should leave until the deadline.
        growth: seconds that a larger gang must save for each worker-second it costs more.
        thrift: met deadlines that a worker-second is worth, beyond what the request costs anyway.
        worth: met deadlines that a regrouping must win.
        gain: by how much more work per second justifies regrouping when it wins fewer.
    """

    review_s: float = 0.25
    patience_s: float = 60.0
    turn_s: float = 60.0
    share: float = 0.125
    planned: int = 12
    exchanges: int = 4
    caution: float = 0.5
    growth: float = 0.2
    thrift: float = 0.03
    worth: float = 0.05
    gain: float = 1.3


@dataclass(slots=True)
class _Outlook:
    """What an order of the deadlines comes to: its value, and how the requests that meet theirs run."""

    value: float
    runs: dict[str, Run]


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
        config = self.config
        turn = view.now_s % config.turn_s < config.share * config.turn_s
        scene = scene_of(view, model, config.planned, config.patience_s, turn)
        best = self._search(scene)
        sizes = self._fill(scene, best, {})
        if all(j.size for j in scene.forced):
            calm = self._try(scene, scene.planned, calm=True)
            same = self._fill(scene, calm, {j.id: j.size for j in scene.all if j.size})
            gain = _pace(scene, sizes) / max(_pace(scene, same), 1e-9)
            if best.value <= calm.value + self.config.worth and gain <= self.config.gain:
                sizes = same
        return Plan(place(view, sizes))

    def _search(self, scene: Scene) -> _Outlook:
        """The best of a bounded number of orders: due first, cheap first, and those with one job moved."""
        best_order, best = scene.planned, self._try(scene, scene.planned)
        if len(best.runs) == len(scene.planned):
            return best
        cheap = sorted(scene.planned, key=lambda j: (j.least_worker_seconds() / j.weight, j.id))
        moves: list[tuple[list[Job], list[Job]]] = [(cheap, [])]
        moves += [([job], []) for job in cheap if job.id not in best.runs][: self.config.exchanges]
        moves += [([], [job]) for job in reversed(cheap) if job.id in best.runs][: self.config.exchanges]
        for front, back in moves:
            moved = {job.id for job in (*front, *back)}
            order = [*front, *(job for job in best_order if job.id not in moved), *back]
            outlook = self._try(scene, order)
            if outlook.value > best.value:
                best_order, best = order, outlook
        return best

    def _try(self, scene: Scene, order: list[Job], calm: bool = False) -> _Outlook:
        """Pour jobs in this order, each on the smallest gang that meets its deadline; leave out the rest.

        A gang that meets it with no more room than the model may err is taken only where no larger one
        leaves more.

        When `calm`, everyone who runs keeps its gang until the first of them is done.
        """
        now = scene.now_s
        timeline = Timeline(now, scene.room.copy())
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
            found: Run | None = None
            for at, size in enumerate(job.sizes):
                if now + job.left_s[at] > job.deadline_s and size != job.size:
                    continue
                run = timeline.pour(job, size, hold)
                if run is None:
                    continue
                found = found or run
                if run.end_s + self.config.caution * job.error * job.left_s[at] <= job.deadline_s:
                    found = run
                    break
            if found is not None:
                timeline.take(found, hold)
                outlook.runs[job.id] = found
                extra = found.worker_seconds - job.worker_seconds(0)
                outlook.value += job.weight * (1.0 - self.config.thrift * extra)
        return outlook

    def _fill(self, scene: Scene, outlook: _Outlook, held: dict[str, int]) -> dict[str, int]:
        """Gang sizes for now: those held, what the outlook starts with, and all that idle workers can do."""
        sizes = dict(held)
        room = scene.room.copy()
        for size in held.values():
            room.take(size)
        for job in scene.all:
            if job.id in sizes:
                continue
            if job.id in outlook.runs:
                size = outlook.runs[job.id].first
            elif job in scene.planned:
                size = 0
            else:
                size = job.size if job.pinned else job.sizes[0]
            if size and room.fits(size):
                sizes[job.id] = size
                room.take(size)
        self._grow([j for j in scene.all if j.id in sizes and not j.pinned], sizes, room)
        return sizes

    def _grow(self, jobs: list[Job], sizes: dict[str, int], room: Room) -> None:
        """Give idle workers to the gangs that save most for them, where that repays the regrouping."""
        while True:
            best: tuple[float, Job, int] | None = None
            for job in jobs:
                at = job.index(sizes[job.id])
                if at + 1 == len(job.sizes) or not room.fits(job.sizes[at + 1], job.sizes[at]):
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
            room.take(size, sizes[job.id])
            sizes[job.id] = size


def _pace(scene: Scene, sizes: dict[str, int]) -> float:
    """Work done each second, in worker-seconds of the smallest gangs."""
    return sum(
        j.worker_seconds(0) / j.left_s[j.index(sizes[j.id])]
        for j in scene.all
        if j.id in sizes and j.left_s[0] > 0
    )
