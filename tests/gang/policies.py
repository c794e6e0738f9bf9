"""Host policies that tests script."""

from __future__ import annotations

import random
from collections.abc import Sequence

from distriray.routing.buddy import BuddyAllocator
from distriray.routing.latency import LatencyModel
from distriray.routing.policies.earliest_deadline import EarliestDeadlineFirst
from distriray.routing.policy import HostPolicy, HostView, Plan, Workers


class Changeable:
    """Another policy, which may be changed while the host runs."""

    def __init__(self) -> None:
        self.inner: HostPolicy = EarliestDeadlineFirst()

    def change(self, inner: HostPolicy) -> None:
        self.inner = inner

    @property
    def review_s(self) -> float | None:
        return self.inner.review_s

    @property
    def regroups(self) -> bool:
        return self.inner.regroups

    def plan(self, view: HostView, model: LatencyModel) -> Plan:
        held = [w for request in view.requests for w in request.workers or ()]
        assert len(held) == len(set(held)), f"a worker is in two gangs: {view}"
        return self.inner.plan(view, model)


class Script:
    """The only request moves on to the next gang whenever it was seen to make so many steps in one; it waits
    for a gang whose workers are not all there."""

    review_s = 0.01
    regroups = True

    def __init__(self, gangs: Sequence[Workers], every: int) -> None:
        self.gangs, self.every = gangs, every
        self.at = 0
        self.since: int | None = None

    def plan(self, view: HostView, model: LatencyModel) -> Plan:
        (request,) = view.requests
        if request.workers == self.gangs[self.at]:
            if self.since is None:
                self.since = request.steps_done
            elif request.steps_done - self.since >= self.every and self.at + 1 < len(self.gangs):
                self.at, self.since = self.at + 1, None
        there = set(self.gangs[self.at]) <= set(view.workers)
        return Plan({request.id: self.gangs[self.at]} if there else {})


class Shuffle:
    """Requests stay, leave or change their gang at random."""

    review_s = 0.05
    regroups = True

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def plan(self, view: HostView, model: LatencyModel) -> Plan:
        blocks = BuddyAllocator(view.workers, view.gang_sizes)
        assignments: dict[str, Workers] = {}
        for request in view.requests:
            if request.workers is not None and (request.pinned or self.draw.random() < 0.8):
                blocks.take(request.workers)
                assignments[request.id] = request.workers
        for request in view.requests:
            sizes = [size for size in view.gang_sizes if request.allows(size)]
            if request.id not in assignments and (block := blocks.lease(self.draw.choice(sizes))):
                assignments[request.id] = block
        return Plan(assignments)


class NewestFirst:
    """The request that came last has all workers; the others yield to it."""

    review_s = None
    regroups = True

    def plan(self, view: HostView, model: LatencyModel) -> Plan:
        pinned = [request for request in view.requests if request.pinned]
        newest = (pinned or view.requests)[-1]
        return Plan({newest.id: view.workers} if view.workers else {})
