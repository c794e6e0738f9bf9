"""Layout of a gang: halves of the batch by patches of the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distriray.errors import InvalidRequest


@dataclass(frozen=True)
class GangLayout:
    """A gang's ranks as halves x patches: rank = half x patches + patch.

    A *half* computes one half of the batch: with classifier-free guidance, one branch. Its ranks cut the
    image into *patches* of rows, one each. With one half, every rank computes the whole batch.

    Args:
        world_size: ranks of the gang.
        halves: 1 or 2.

    Raises:
        InvalidRequest: the ranks do not divide into the halves.
    """

    world_size: int
    halves: int = 1

    def __post_init__(self) -> None:
        if self.world_size % self.halves:
            raise InvalidRequest(
                f"cfg_parallel=True splits the gang into halves, but it has {self.world_size} ranks; "
                "use 'auto'",
                param="gang_size",
            )

    @classmethod
    def of(cls, world_size: int, batch: int, cfg_parallel: bool | Literal["auto"]) -> GangLayout:
        """The layout in which `world_size` ranks compute a batch: two halves where `cfg_parallel` has it so.

        Raises:
            InvalidRequest: `cfg_parallel=True`, and the gang or the batch is odd.
        """
        if cfg_parallel is not True or world_size == 1:
            splits = cfg_parallel == "auto" and world_size % 2 == 0 and batch % 2 == 0
            return cls(world_size, 2 if splits else 1)
        layout = cls(world_size, 2)
        if batch % 2:
            raise InvalidRequest(
                f"cfg_parallel=True splits the batch into halves, but it is a batch of {batch}; "
                "without guidance use 'auto'",
                param="guidance_scale",
            )
        return layout

    @property
    def patches(self) -> int:
        """Ranks that share one half's image."""
        return self.world_size // self.halves

    def half(self, rank: int) -> int:
        """The half that `rank` is in."""
        return rank // self.patches

    def patch(self, rank: int) -> int:
        """The patch that `rank` owns, which is its rank within its half."""
        return rank % self.patches

    def ranks(self, half: int) -> range:
        """The ranks of a half, in the order of their patches."""
        return range(half * self.patches, (half + 1) * self.patches)

    def batch_slice(self, rank: int, batch: int) -> slice:
        """The part of a batch that `rank` computes."""
        half = self.half(rank)
        return slice(half * batch // self.halves, (half + 1) * batch // self.halves)
