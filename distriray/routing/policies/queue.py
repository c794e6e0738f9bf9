"""Parts that policies without regrouping share: what runs stays, and the rest waits in some order."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from distriray.routing.buddy import BuddyAllocator
from distriray.routing.latency import LatencyModel
from distriray.routing.policy import HostView, RequestView, Workers


def running(view: HostView) -> tuple[BuddyAllocator, dict[str, Workers]]:
    """The workers that are free, and the assignments that stay as they are."""
    blocks = BuddyAllocator(view.workers, view.gang_sizes)
    assignments = {r.id: r.workers for r in view.requests if r.workers is not None}
    for workers in assignments.values():
        blocks.take(workers)
    return blocks, assignments


def waiting(view: HostView, key: Callable[[RequestView], float] | None = None) -> list[RequestView]:
    """The requests that hold no workers, by `key`, then in order of arrival."""
    requests = [r for r in view.requests if r.workers is None]
    return sorted(requests, key=lambda r: (key(r) if key else 0.0, r.arrival_s, r.id))


def due_s(request: RequestView) -> float:
    """The deadline of a request; infinite when it has none."""
    return inf if request.deadline_s is None else request.deadline_s


def remaining_s(request: RequestView, size: int, model: LatencyModel) -> float:
    """Predicted seconds until `request` is finished if it starts or goes on with a gang of `size`.

    Going on with the gang it has costs nothing extra; anything else costs a regrouping.
    """
    times = model.times(size, *request.shape)
    seconds = request.left_s(times)
    if request.steps_done and (request.workers is None or len(request.workers) != size):
        seconds += times.regroup_s
    return seconds
