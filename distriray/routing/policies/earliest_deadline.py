"""Earliest deadline first, without regrouping."""

from __future__ import annotations

from typing import NamedTuple

from distriray.routing.buddy import BuddyAllocator, aligned_blocks
from distriray.routing.latency import LatencyModel
from distriray.routing.policies.queue import remaining_s, running, waiting
from distriray.routing.policy import HostView, Plan, RequestView, Workers

PATIENCE_S = 60.0


class EarliestDeadlineFirst:
    """Earliest deadline first, each on the largest free gang; a request that runs is left alone.

    Nobody starves. A request without a deadline counts as due `PATIENCE_S` after its arrival, so that only
    finitely many requests ever come before it. The first request for which no gang is free has a block kept
    for it, the one that is free soonest, so that smaller gangs do not take its workers one by one. The others
    start beside that block, or in it if they are done before it is free (EASY backfilling, Lifka 1995).
    """

    review_s: float | None = None
    regroups = False

    def plan(self, view: HostView, model: LatencyModel) -> Plan:
        """See `HostPolicy.plan`."""
        blocks, assignments = running(view)
        kept: _KeptBlock | None = None
        for request in waiting(view, self._due_s):
            for size in reversed(view.gang_sizes):
                if not request.allows(size):
                    continue
                workers = blocks.lease(size)
                if workers is None and kept is not None:
                    workers = kept.lease(size, remaining_s(request, size, model))
                if workers is not None:
                    assignments[request.id] = workers
                    break
            else:
                kept = kept or _keep_block(blocks, request, view, model)
        return Plan(assignments)

    def _due_s(self, request: RequestView) -> float:
        return request.arrival_s + PATIENCE_S if request.deadline_s is None else request.deadline_s


class _KeptBlock(NamedTuple):
    """The free workers of a block that will be free as a whole in `left_s` seconds."""

    blocks: BuddyAllocator
    left_s: float

    def lease(self, size: int, seconds: float) -> Workers | None:
        """Workers for a gang that is done in time."""
        return self.blocks.lease(size) if seconds <= self.left_s else None


def _keep_block(
    blocks: BuddyAllocator, request: RequestView, view: HostView, model: LatencyModel
) -> _KeptBlock | None:
    """Take the free workers of the block that `request` can have soonest; None if no block is healthy.

    The time until that block is free falls with every step of those that hold it, whoever joins them is
    done sooner, and another block is only kept in its place if that is free sooner still. So the request
    starts, however wrong the predictions are.
    """
    left_s = {w: remaining_s(r, len(r.workers), model) for r in view.requests if r.workers for w in r.workers}
    healthy = set(view.workers)
    free_in_s = {
        block: max(left_s.get(worker, 0.0) for worker in block)
        for block in aligned_blocks(max(healthy, default=-1) + 1, view.gang_sizes)
        if request.allows(len(block)) and healthy.issuperset(block)
    }
    if not free_in_s:
        return None
    soonest = min(free_in_s, key=free_in_s.__getitem__)
    free = blocks.free.intersection(soonest)
    blocks.take(free)
    return _KeptBlock(BuddyAllocator(free, view.gang_sizes), free_in_s[soonest])
