"""From gang sizes to aligned workers, moving as few requests as possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from .buddy import BuddyAllocator, aligned_blocks
from .policy import HostView, RequestView, Workers


@dataclass(slots=True)
class Room:
    """Which gangs fit on a host at once, wherever they come to lie.

    Blocks nest, so some gangs fit exactly if, for each size, those at least as large fit into the blocks of
    that size that no dead worker breaks.

    Attributes:
        left: for each gang size, ascending, the workers in such blocks, without gangs at least as large.
    """

    left: dict[int, int]

    @classmethod
    def of(cls, view: HostView) -> Room:
        """The room on a host where nothing runs."""
        healthy = set(view.workers)
        left = dict.fromkeys(view.gang_sizes, 0)
        for block in aligned_blocks(max(healthy, default=-1) + 1, view.gang_sizes):
            if healthy.issuperset(block):
                left[len(block)] += len(block)
        return cls(left)

    def copy(self) -> Room:
        """Room that can be taken without taking it here."""
        return Room(dict(self.left))

    @property
    def largest(self) -> int:
        """Size of the largest gang that fits, as then all smaller ones do; 0 when none does."""
        found, least = 0, inf
        for size, left in self.left.items():
            least = min(least, left)
            if least >= size:
                found = size
        return found

    def fits(self, size: int, instead_of: int = 0) -> bool:
        """Whether there is room for one more gang of `size`, or for one in place of a smaller one."""
        return all(
            n >= size - (instead_of if s <= instead_of else 0) for s, n in self.left.items() if s <= size
        )

    def take(self, size: int, instead_of: int = 0) -> None:
        """Make use of the room that `fits` found; where there was less, none is left."""
        for s, left in self.left.items():
            used = (size if s <= size else 0) - (instead_of if s <= instead_of else 0)
            self.left[s] = max(0, left - used)


def place(view: HostView, sizes: Mapping[str, int]) -> dict[str, Workers]:
    """Workers for each request in `sizes`, which is in order of importance.

    Who keeps its size keeps its workers if the rest fits around it; otherwise all but pinned requests are
    packed anew, the largest first. A pinned one may lie in a block that the sizes count on: then the largest
    allowed gang that there is takes its place, and nobody moves for it unless somebody would have to wait.
    """
    chosen = {r.id: r for r in view.requests if r.id in sizes}
    wanted = [(chosen[name], size) for name, size in sizes.items() if name in chosen]
    pinned = [r for r in view.requests if r.pinned and r.workers is not None]
    stay = [r for r, size in wanted if r.workers is not None and len(r.workers) == size and not r.pinned]
    as_wanted = _pack(view, wanted, [*pinned, *stay], False) or _pack(view, wanted, pinned, False)
    if as_wanted:
        return as_wanted
    calm = _pack(view, wanted, [*pinned, *stay], True)
    return calm if calm.keys() >= chosen.keys() else _pack(view, wanted, pinned, True)


def _pack(
    view: HostView, wanted: list[tuple[RequestView, int]], fixed: list[RequestView], settle: bool
) -> dict[str, Workers]:
    """Everyone in `fixed` where it is and the others around them, largest first; {} if one does not fit.

    With `settle`, one that does not fit gets a smaller gang, or waits.
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
