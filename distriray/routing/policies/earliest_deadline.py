"""Earliest deadline first, without regrouping."""

from __future__ import annotations

from ..latency import LatencyModel
from ..policy import HostView, Plan
from .queue import due_s, running, waiting


class EarliestDeadlineFirst:
    """Earliest deadline first, then arrival, each on the largest free gang; nobody who runs is disturbed."""

    review_s: float | None = None

    def plan(self, view: HostView, model: LatencyModel) -> Plan:
        """See `HostPolicy.plan`."""
        blocks, assignments = running(view)
        for request in waiting(view, due_s):
            for size in reversed(view.gang_sizes):
                if request.allows(size) and (block := blocks.lease(size)) is not None:
                    assignments[request.id] = block
                    break
        return Plan(assignments)
