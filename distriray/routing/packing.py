"""From gang sizes to aligned workers, moving as few requests as possible."""

from __future__ import annotations

from collections.abc import Mapping

from distriray.routing.buddy import BuddyAllocator
from distriray.routing.policy import HostView, RequestView, Workers


def place(view: HostView, sizes: Mapping[str, int]) -> dict[str, Workers]:
    """Workers for each request in `sizes`, which is in order of importance.

    A request that keeps its size keeps its workers if the rest fits around it; otherwise all but the pinned
    ones are packed again, the largest first. A pinned request may occupy a block that the chosen sizes assume
    is free: then the request that does not fit gets the largest gang that it may have and that is free, and
    the others move for it only if a request would have to wait otherwise.
    """
    chosen = {r.id: r for r in view.requests if r.id in sizes}
    wanted = [(chosen[name], size) for name, size in sizes.items() if name in chosen]
    pinned = [r for r in view.requests if r.pinned and r.workers is not None]
    stay = [r for r, size in wanted if r.workers is not None and len(r.workers) == size and not r.pinned]
    as_wanted = _pack(view, wanted, [*pinned, *stay]) or _pack(view, wanted, pinned)
    if as_wanted:
        return as_wanted
    calm = _pack(view, wanted, [*pinned, *stay], settle=True)
    return calm if calm.keys() >= chosen.keys() else _pack(view, wanted, pinned, settle=True)


def _pack(
    view: HostView, wanted: list[tuple[RequestView, int]], fixed: list[RequestView], settle: bool = False
) -> dict[str, Workers]:
    """The requests in `fixed` where they are, and the others around them, the largest first.

    If one does not fit, the result is {}; with `settle`, that one gets a smaller gang or waits.
    """
    blocks = BuddyAllocator(view.workers, view.gang_sizes)
    result: dict[str, Workers] = {}
    for request in fixed:
        if request.workers is not None:
            blocks.take(request.workers)
            result[request.id] = request.workers
    for request, size in sorted(wanted, key=lambda pair: -pair[1]):
        if request.id in result:
            continue
        block = _near(blocks, request, size) or blocks.lease(size)
        if block is None and not settle:
            return {}
        if block is None:
            smaller = [s for s in reversed(view.gang_sizes) if s < size and request.allows(s)]
            block = next((b for s in smaller if (b := _near(blocks, request, s) or blocks.lease(s))), None)
        if block is not None:
            result[request.id] = block
    return result


def _near(blocks: BuddyAllocator, request: RequestView, size: int) -> Workers | None:
    """A free block within or around the workers that the request has."""
    if request.workers is None:
        return None
    start = request.workers[0] - request.workers[0] % size
    block = tuple(range(start, start + size))
    if not blocks.free.issuperset(block):
        return None
    blocks.take(block)
    return block
