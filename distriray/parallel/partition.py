"""Ranges of rows and tokens: what each rank owns, and what a convolution needs of its peers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from distriray.errors import InvalidRequest, UnsupportedModel

Sequence = Literal["joint", "image"]
"""Tokens that an attention is over: those of image and text, or the image's alone."""


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution along rows."""

    kernel: int
    stride: int
    dilation: int
    padding: tuple[int, int]

    @property
    def reach(self) -> int:
        """Rows from the first to the last tap, both counted."""
        return self.dilation * (self.kernel - 1) + 1


@dataclass(frozen=True)
class Halo:
    """The rows around one rank's patch that a convolution reads, at one level.

    Attributes:
        zeros: rows of padding (above, below) that lie outside the image.
        receive: rows that come from each peer; a lower rank's go above the patch, a higher rank's below.
        send: for each peer, the rows [start, stop) of this rank's patch that it needs.
    """

    zeros: tuple[int, int]
    receive: dict[int, int]
    send: dict[int, tuple[int, int]]


@dataclass(frozen=True)
class Partition:
    """Contiguous row ranges of a latent of `height` by `width` over `world_size` ranks.

    Rows are dealt in units of `2 ** levels`, so that a boundary is a boundary at every scale of a network
    with that many downsamplings. Level 0 is the latent; level l has `ceil(height / 2**l)` rows. The first
    ranks get one unit more where they do not divide; the last unit may be partial.

    Raises:
        InvalidRequest: fewer units than ranks.
    """

    height: int
    width: int
    levels: int
    world_size: int

    def __post_init__(self) -> None:
        if self.units < self.world_size:
            smallest = (self.world_size - 1) * 2**self.levels + 1
            raise InvalidRequest(
                f"a latent of {self.height} rows is too small for {self.world_size} patches of this model; "
                f"the smallest that works has {smallest} rows",
                param="height",
            )

    @property
    def units(self) -> int:
        """Units of rows, the last of which may be partial."""
        return -(-self.height // 2**self.levels)

    @cached_property
    def _unit_bounds(self) -> tuple[int, ...]:
        each, extra = divmod(self.units, self.world_size)
        return tuple(rank * each + min(rank, extra) for rank in range(self.world_size + 1))

    def shape(self, level: int) -> tuple[int, int]:
        """Rows and columns of the whole feature map at `level`."""
        return -(-self.height // 2**level), -(-self.width // 2**level)

    def rows(self, rank: int, level: int = 0) -> tuple[int, int]:
        """The rows [start, stop) that `rank` owns at `level`."""
        scale, height = 2 ** (self.levels - level), self.shape(level)[0]
        return self._unit_bounds[rank] * scale, min(self._unit_bounds[rank + 1] * scale, height)

    def counts(self, level: int) -> tuple[int, ...]:
        """Numbers of rows that each rank owns at `level`."""
        bounds = (self.rows(rank, level) for rank in range(self.world_size))
        return tuple(stop - start for start, stop in bounds)

    def level_of(self, rank: int, size: tuple[int, ...]) -> int:
        """The level at which `rank`'s patch has `size`: (rows, columns), or (tokens,)."""
        for level in range(self.levels + 1):
            start, stop = self.rows(rank, level)
            columns = self.shape(level)[1]
            if size in ((stop - start, columns), ((stop - start) * columns,)):
                return level
        raise UnsupportedModel(f"a feature map of {size} rows and columns is no level of {self}")

    def halo(self, rank: int, level: int, window: Window) -> Halo:
        """Rows that `rank` exchanges for a convolution with `window` whose input is at `level`."""
        needs = [self.reads(peer, level, window) for peer in range(self.world_size)]
        height = self.shape(level)[0]
        first, last = self.rows(rank, level)
        receive: dict[int, int] = {}
        send: dict[int, tuple[int, int]] = {}
        for peer in range(self.world_size):
            if peer == rank:
                continue
            start, stop = _overlap(needs[rank], self.rows(peer, level))
            if start < stop:
                receive[peer] = stop - start
            start, stop = _overlap(needs[peer], (first, last))
            if start < stop:
                send[peer] = (start - first, stop - first)
        return Halo((max(0, -needs[rank][0]), max(0, needs[rank][1] - height)), receive, send)

    def reads(self, rank: int, level: int, window: Window) -> tuple[int, int]:
        """Input rows [start, stop) of the output that `rank` owns; outside the image they are padding."""
        height = self.shape(level)[0]
        output_level = level + window.stride.bit_length() - 1
        outputs = (height + sum(window.padding) - window.reach) // window.stride + 1
        if output_level > self.levels or outputs != self.shape(output_level)[0]:
            raise UnsupportedModel(
                f"{window} turns {height} rows into {outputs}, which is no level of this network's partition"
            )
        start, stop = self.rows(rank, output_level)
        top = window.padding[0]
        return start * window.stride - top, (stop - 1) * window.stride - top + window.reach


@dataclass(frozen=True)
class TokenPartition(Partition):
    """Contiguous ranges of an image's tokens, and of its text's, over `world_size` ranks.

    Of the image it is a partition of `height` rows of one token each. The first ranks get one more where they
    do not divide, and of the text the last ranks do, so that all have nearly as many.

    Attributes:
        text: tokens of the text that are dealt; 0 where every rank has all of them.

    Raises:
        InvalidRequest: fewer tokens of the image than ranks.
    """

    text: int = 0

    @classmethod
    def of(cls, image: int, text: int, world_size: int) -> TokenPartition:
        """The partition of that many tokens."""
        return cls(height=image, width=1, levels=0, world_size=world_size, text=text)

    def __post_init__(self) -> None:
        if self.height < self.world_size:
            raise InvalidRequest(
                f"an image of {self.height} tokens is too small for {self.world_size} patches", param="height"
            )

    def text_tokens(self, rank: int) -> tuple[int, int]:
        """The tokens [start, stop) of the text that `rank` owns."""
        return self._text_bounds[rank], self._text_bounds[rank + 1]

    def of_sequence(self, sequence: Sequence) -> tuple[int, ...]:
        """Numbers of tokens of a sequence that each rank owns."""
        return self.joint if sequence == "joint" else self.counts(0)

    @cached_property
    def joint(self) -> tuple[int, ...]:
        """Numbers of tokens of image and text together that each rank owns."""
        texts = (stop - start for start, stop in map(self.text_tokens, range(self.world_size)))
        return tuple(image + text for image, text in zip(self.counts(0), texts, strict=True))

    @cached_property
    def _text_bounds(self) -> tuple[int, ...]:
        each, extra = divmod(self.text, self.world_size)
        without = self.world_size - extra
        return tuple(rank * each + max(0, rank - without) for rank in range(self.world_size + 1))


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return max(a[0], b[0]), min(a[1], b[1])
