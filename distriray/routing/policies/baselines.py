"""Host policies to compare with. None of them regroups: a request that runs, runs to its end."""

from __future__ import annotations

from collections.abc import Iterable

from distriray.routing.buddy import BuddyAllocator
from distriray.routing.latency import LatencyModel
from distriray.routing.policies.queue import due_s, remaining_s, running, waiting
from distriray.routing.policy import HostView, Plan, RequestView, Workers

Shape = tuple[int, int, int]


class FixedSize:
    """Every request on a gang of one size, in order of arrival (DistriFusion as a service)."""

    review_s: float | None = None
    regroups = False

    def __init__(self, size: int) -> None:
        self.size = size

    def plan(self, view: HostView, model: LatencyModel) -> Plan:
        """See `HostPolicy.plan`."""
        blocks, assignments = running(view)
        for request in waiting(view):
            block = blocks.lease(self.size)
            if block is None:
                break
            assignments[request.id] = block
        return Plan(assignments)


class SizePerShape:
    """One gang size for each (height, width, batch), in order of arrival.

    Args:
        sizes: gang size of each shape.
        backfill: whether a request may start ahead of an earlier one that still waits for its gang.
    """

    review_s: float | None = None
    regroups = False

    def __init__(self, sizes: dict[Shape, int], backfill: bool) -> None:
        self.sizes = sizes
        self.backfill = backfill

    def plan(self, view: HostView, model: LatencyModel) -> Plan:
        """See `HostPolicy.plan`."""
        blocks, assignments = running(view)
        for request in waiting(view):
            block = blocks.lease(self.sizes[request.height, request.width, request.batch])
            if block is not None:
                assignments[request.id] = block
            elif not self.backfill:
                break
        return Plan(assignments)


class Leases:
    """Each request leases the smallest gang that meets its deadline, the earliest deadline first.

    Where none does, it takes the largest that is free; where the one it needs is not free, it waits and
    later deadlines may start.

    Args:
        late_last: put requests whose deadline cannot be met any more behind all others, on one worker.
    """

    review_s: float | None = None
    regroups = False

    def __init__(self, late_last: bool = False) -> None:
        self.late_last = late_last

    def plan(self, view: HostView, model: LatencyModel) -> Plan:
        """See `HostPolicy.plan`."""
        blocks, assignments = running(view)
        late: list[RequestView] = []
        for request in waiting(view, due_s):
            if not blocks.free:
                break
            sizes = [s for s in view.gang_sizes if request.allows(s)]
            meets = [s for s in sizes if view.now_s + remaining_s(request, s, model) <= due_s(request)]
            if not meets and self.late_last:
                late.append(request)
                continue
            tries = meets[:1] if meets else reversed(sizes)
            _lease(blocks, assignments, request, tries)
        for request in late:
            _lease(blocks, assignments, request, [s for s in view.gang_sizes if request.allows(s)])
        return Plan(assignments)


def _lease(
    blocks: BuddyAllocator, assignments: dict[str, Workers], request: RequestView, sizes: Iterable[int]
) -> None:
    """The first of `sizes` that is free."""
    for size in sizes:
        if (block := blocks.lease(size)) is not None:
            assignments[request.id] = block
            return
