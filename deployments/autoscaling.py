"""The number of hosts that a pool should have: by the seconds of work before them, not by requests."""

from __future__ import annotations

import math
from typing import Any

BACKLOG_S = "backlog_s"
"""The name under which a host reports its predicted seconds of accepted work to Serve."""


class QueuedWork:
    """A Serve autoscaling policy: enough hosts that each has `target_s` seconds of work before it.

    Serve adds its own delays and bounds, and starts a first host when a request waits for one.
    """

    def __init__(self, target_s: float) -> None:
        self.target_s = target_s

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of hosts to aim for, and no state; `context` is an `AutoscalingContext`."""
        backlog_s = sum((context.aggregated_metrics or {}).get(BACKLOG_S, {}).values())
        waiting = (context.total_queued_requests or 0) > 0
        return max(math.ceil(backlog_s / self.target_s), int(waiting)), {}
