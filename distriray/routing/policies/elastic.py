"""The elastic host policy: gangs that change at step boundaries so that deadlines are met.

Every request with a deadline that can still be met is fitted into the free workers of the time ahead, in
some order, on the smallest gang that meets it; gangs may change on the way wherever workers come free. A
few orders are tried (earliest deadline first, cheapest first, then single exchanges, as in Moore's
algorithm for the fewest late jobs) and the best is kept, but only if it beats leaving everything as it is.
The workers that stay idle go to requests without a deadline and to late ones, by response ratio, and then
to the gangs that gain most.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from distriray.routing.candidates import Candidate, Candidates, select_candidates
from distriray.routing.capacity import Capacity
from distriray.routing.latency import LatencyModel
from distriray.routing.packing import place
from distriray.routing.policy import HostView, Plan
from distriray.routing.timeline import Reservation, Timeline


@dataclass(frozen=True, slots=True)
class ElasticConfig:
    """The weights and limits of the policy.

    Attributes:
        review_s: seconds to the next decision, where nothing happens before.
        patience_s: how long a request may be passed over, after its arrival or, if it has one, its
            deadline, before it has a turn.
        starved_every_s: seconds from one turn of such requests to the next.
        starved_share: fraction of that time that is their turn: the oldest first, each on its smallest gang.
        max_planned: maximum number of deadlines to plan for, the earliest first.
        max_exchanges: maximum number of requests to try in front of the others, and again behind them.
        error_margin: how many of the latency model's errors a gang should leave until the deadline.
        min_saving_per_worker_s: seconds that a larger gang must save for each worker-second it costs more.
        worker_second_price: met deadlines that a worker-second is worth, beyond those of its smallest gang.
        regroup_threshold: met deadlines that a regrouping must win.
        regroup_speedup: how many times as much work per second justifies a regrouping that wins fewer.
    """

    review_s: float = 0.25
    patience_s: float = 60.0
    starved_every_s: float = 60.0
    starved_share: float = 0.125
    max_planned: int = 12
    max_exchanges: int = 4
    error_margin: float = 0.5
    min_saving_per_worker_s: float = 0.2
    worker_second_price: float = 0.03
    regroup_threshold: float = 0.05
    regroup_speedup: float = 1.3


@dataclass(slots=True)
class _Schedule:
    """An order of the deadlines carried through: its value, and reservations of those it meets."""

    value: float
    reservations: dict[str, Reservation]


class Elastic:
    """Meets the most deadlines with the fewest worker-seconds, and starves nobody (see the module)."""

    regroups = True

    def __init__(self, config: ElasticConfig | None = None) -> None:
        self.config = config or ElasticConfig()

    @property
    def review_s(self) -> float | None:
        """Slack runs out and deadlines pass between events, so it looks again now and then."""
        return self.config.review_s

    def plan(self, view: HostView, model: LatencyModel) -> Plan:
        """See `HostPolicy.plan`."""
        config = self.config
        starved_turn = view.now_s % config.starved_every_s < config.starved_share * config.starved_every_s
        candidates = select_candidates(view, model, config.max_planned, config.patience_s, starved_turn)
        best = self._search(candidates)
        sizes = self._fill(candidates, best, {})
        if all(c.size for c in candidates.must_run):
            calm = self._try(candidates, candidates.with_deadline, calm=True)
            same = self._fill(candidates, calm, {c.id: c.size for c in candidates.all if c.size})
            speedup = _pace(candidates, sizes) / max(_pace(candidates, same), 1e-9)
            if best.value <= calm.value + config.regroup_threshold and speedup <= config.regroup_speedup:
                sizes = same
        return Plan(place(view, sizes))

    def _search(self, candidates: Candidates) -> _Schedule:
        """The best of a bounded number of orders: due first, cheap first, and with one request moved."""
        by_deadline, tries = candidates.with_deadline, self.config.max_exchanges
        best_order, best = by_deadline, self._try(candidates, by_deadline)
        if len(best.reservations) == len(by_deadline):
            return best
        cheap = sorted(by_deadline, key=lambda c: (c.least_worker_seconds() / c.weight, c.id))
        moves: list[tuple[list[Candidate], list[Candidate]]] = [(cheap, [])]
        moves += [([c], []) for c in cheap if c.id not in best.reservations][:tries]
        moves += [([], [c]) for c in reversed(cheap) if c.id in best.reservations][:tries]
        for front, back in moves:
            moved = {c.id for c in (*front, *back)}
            order = [*front, *(c for c in best_order if c.id not in moved), *back]
            schedule = self._try(candidates, order)
            if schedule.value > best.value:
                best_order, best = order, schedule
        return best

    def _try(self, candidates: Candidates, order: list[Candidate], calm: bool = False) -> _Schedule:
        """Fit requests in this order, each on the smallest gang that meets its deadline; leave out the rest.

        A gang that meets it by less than the error margin is taken only where no larger one leaves more.

        When `calm`, everyone who runs keeps its gang until the first of them is done.
        """
        now = candidates.now_s
        timeline = Timeline(now, candidates.capacity.copy())
        until = -inf
        if calm:
            running = [c for c in candidates.all if c.size]
            until = min((now + c.left_s[c.index(c.size)] for c in running), default=-inf)
            for c in running:
                timeline.occupy(now, until, c.size)
        for c in candidates.must_run:
            reservation = timeline.fit(c, c.size or c.sizes[0], until)
            if reservation is not None:
                timeline.reserve(reservation, until)
        schedule = _Schedule(0.0, {})
        for c in order:
            hold = until if c.size else -inf
            found: Reservation | None = None
            for at, size in enumerate(c.sizes):
                if now + c.left_s[at] > c.deadline_s and size != c.size:
                    continue
                reservation = timeline.fit(c, size, hold)
                if reservation is None:
                    continue
                found = found or reservation
                if reservation.end_s + self.config.error_margin * c.error * c.left_s[at] <= c.deadline_s:
                    found = reservation
                    break
            if found is not None:
                timeline.reserve(found, hold)
                schedule.reservations[c.id] = found
                extra = found.worker_seconds - c.worker_seconds()
                schedule.value += c.weight * (1.0 - self.config.worker_second_price * extra)
        return schedule

    def _fill(self, candidates: Candidates, schedule: _Schedule, held: dict[str, int]) -> dict[str, int]:
        """Gang sizes for now: those held, those the schedule starts with, and what idle workers allow."""
        sizes = dict(held)
        capacity = candidates.capacity.copy()
        for size in held.values():
            capacity.take(size)
        for c in candidates.all:
            if c.id in sizes:
                continue
            if c.id in schedule.reservations:
                size = schedule.reservations[c.id].first
            elif c in candidates.with_deadline:
                size = 0
            else:
                size = c.size if c.pinned else c.sizes[0]
            if size and capacity.fits(size):
                sizes[c.id] = size
                capacity.take(size)
        self._grow([c for c in candidates.all if c.id in sizes and not c.pinned], sizes, capacity)
        return sizes

    def _grow(self, candidates: list[Candidate], sizes: dict[str, int], capacity: Capacity) -> None:
        """Give idle workers to the gangs that save most for them, where that repays the regrouping."""
        while True:
            best: tuple[float, Candidate, int] | None = None
            for c in candidates:
                at = c.index(sizes[c.id])
                if at + 1 == len(c.sizes) or not capacity.fits(c.sizes[at + 1], c.sizes[at]):
                    continue
                before, after = c.time_to_finish_s(at), c.time_to_finish_s(at + 1)
                saved = before - after
                cost = c.sizes[at + 1] * after - c.sizes[at] * before
                change = c.regroup_s[at + 1] if c.size == c.sizes[at] else 0.0
                if saved > max(change, self.config.min_saving_per_worker_s * cost, 0.0):
                    ratio = saved / max(cost, 1e-9)
                    if best is None or ratio > best[0]:
                        best = (ratio, c, c.sizes[at + 1])
            if best is None:
                return
            _, c, size = best
            capacity.take(size, sizes[c.id])
            sizes[c.id] = size


def _pace(candidates: Candidates, sizes: dict[str, int]) -> float:
    """Work done each second, in worker-seconds of the smallest gangs."""
    return sum(
        c.worker_seconds() / c.left_s[c.index(sizes[c.id])]
        for c in candidates.all
        if c.id in sizes and c.left_s[0] > 0
    )
