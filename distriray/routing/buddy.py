"""Leases of aligned blocks of workers: a gang of size g starts at a multiple of g.

Aligned blocks of sizes that divide one another either contain each other or are disjoint (the buddy scheme
of Knowlton, CACM 1965), so the blocks of a host are few, known in advance, and rarely fragment it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from distriray.errors import DistrirayError


class InvalidGangSizes(DistrirayError, ValueError):
    """Gang sizes that do not nest, or a size that the pool does not lend."""


class WorkersUnavailable(DistrirayError, ValueError):
    """Workers cannot be taken as they are."""


def check_gang_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """`sizes` as a tuple; raises InvalidGangSizes unless ascending and each divides the next."""
    if not sizes or sizes[0] < 1 or any(b <= a or b % a for a, b in zip(sizes, sizes[1:], strict=False)):
        raise InvalidGangSizes(
            f"gang sizes {list(sizes)} do not nest; use ascending sizes where each divides the next, "
            "such as 1, 2, 4, 8"
        )
    return tuple(sizes)


def aligned_blocks(worker_count: int, sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Every block a host of `worker_count` workers can lend, largest first."""
    return tuple(
        tuple(range(start, start + size))
        for size in reversed(check_gang_sizes(sizes))
        for start in range(0, worker_count - size + 1, size)
    )


class BuddyAllocator:
    """The free workers of a host, and leases of aligned blocks of them.

    A lease takes the lowest block of its size out of the smallest free space that holds one, so that large
    blocks stay whole as long as possible.

    Args:
        workers: ids of the healthy workers, any subset of 0 … n-1.
        gang_sizes: the sizes that can be leased, ascending, each dividing the next.
    """

    def __init__(self, workers: Iterable[int], gang_sizes: Sequence[int]) -> None:
        self.gang_sizes = check_gang_sizes(gang_sizes)
        self._free = set(workers)

    @property
    def free(self) -> frozenset[int]:
        """Workers that are healthy and not leased."""
        return frozenset(self._free)

    def lease(self, size: int) -> tuple[int, ...] | None:
        """Take a free aligned block of `size`, or None when there is none."""
        if size not in self.gang_sizes:
            raise InvalidGangSizes(f"gang size {size} is not one of {list(self.gang_sizes)}")
        starts = [w for w in self._free if w % size == 0 and self._whole(w, size)]
        if not starts:
            return None
        start = min(starts, key=lambda w: (self._space(w, size), w))
        block = tuple(range(start, start + size))
        self._free.difference_update(block)
        return block

    def take(self, block: Iterable[int]) -> None:
        """Lease these very workers; raises WorkersUnavailable when one is leased or dead."""
        wanted = set(block)
        if missing := wanted - self._free:
            raise WorkersUnavailable(f"workers {sorted(missing)} are leased or dead")
        self._free -= wanted

    def _whole(self, start: int, size: int) -> bool:
        return all(w in self._free for w in range(start, start + size))

    def _space(self, start: int, size: int) -> int:
        """Size of the largest free aligned block around this one."""
        for larger in reversed(self.gang_sizes):
            if larger >= size and self._whole(start - start % larger, larger):
                return larger
        return size
