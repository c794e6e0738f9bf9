"""The gangs that fit on a host at once."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from distriray.routing.buddy import aligned_blocks
from distriray.routing.policy import HostView


@dataclass(slots=True)
class Capacity:
    """The gangs that fit on a host at once, wherever they come to lie.

    Blocks nest, so some gangs fit exactly if, for each size, those at least as large fit into the blocks of
    that size that no dead worker breaks.

    Attributes:
        free: for each gang size, ascending, the workers in such blocks that no gang at least as large took.
    """

    free: dict[int, int]

    @classmethod
    def of(cls, view: HostView) -> Capacity:
        """The capacity of a host where nothing runs."""
        healthy = set(view.workers)
        free = dict.fromkeys(view.gang_sizes, 0)
        for block in aligned_blocks(max(healthy, default=-1) + 1, view.gang_sizes):
            if healthy.issuperset(block):
                free[len(block)] += len(block)
        return cls(free)

    def copy(self) -> Capacity:
        """A copy to take gangs from."""
        return Capacity(dict(self.free))

    @property
    def largest(self) -> int:
        """Size of the largest gang that fits, as then all smaller ones do; 0 when none does."""
        found, least = 0, inf
        for size, free in self.free.items():
            least = min(least, free)
            if least >= size:
                found = size
        return found

    def fits(self, size: int, instead_of: int = 0) -> bool:
        """True if one more gang of `size` fits, or one in place of a smaller one."""
        return all(
            n >= size - (instead_of if s <= instead_of else 0) for s, n in self.free.items() if s <= size
        )

    def take(self, size: int, instead_of: int = 0) -> None:
        """Claim the capacity that `fits` reported; never goes below zero."""
        for s, free in self.free.items():
            used = (size if s <= size else 0) - (instead_of if s <= instead_of else 0)
            self.free[s] = max(0, free - used)
