"""Ranges of rows and tokens: what each rank owns, and what a convolution needs of its peers."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Literal, get_args

from distriray.config import AttentionMode
from distriray.errors import InvalidRequest, UnsupportedModel

Stream = Literal["image", "text", "references"]
"""Tokens of one kind: of the image, of its text, or of the pictures that it refers to."""
Sequence = Literal["joint", Stream]
"""Tokens that an attention is over: those of all streams, or of one alone."""

MOST_HEADS = 1.25
"""Times its share of the heads that a rank may get where that is not asked for: it attends for as many, and
its peers wait for it."""


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
        return _boundaries(self.units, self.world_size)

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

    def tokens_like(self, rank: int, count: int) -> tuple[int, ...]:
        """Numbers of tokens that each rank has of the feature map of which `rank` has `count`."""
        level = self.level_of(rank, (count,))
        columns = self.shape(level)[1]
        return tuple(rows * columns for rows in self.counts(level))

    def buffers_of(self, rank: int) -> Hashable:
        """A mark of a rank's buffers: of ranks that have the same, none has larger ones than the first."""
        return rank > 0  # the first has most rows, the second halos on both sides

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
    """Contiguous ranges of an image's tokens, and of its text's and references', over `world_size` ranks.

    Of the image it is a partition of `height` rows of one token each. References are dealt so that all ranks
    have nearly as many of pictures, and the text so that they have nearly as many of all; the first ranks
    have one more where they do not divide. So the first one has most of the image, and most in all.

    Attributes:
        text: tokens of the text that are dealt; 0 where every rank has all of them.
        references: tokens of pictures that the image refers to, where they are a stream of their own.

    Raises:
        InvalidRequest: fewer tokens of the image than ranks.
    """

    text: int = 0
    references: int = 0

    @classmethod
    def of(cls, image: int, text: int, world_size: int) -> TokenPartition:
        """The partition of that many tokens."""
        return cls(height=image, width=1, levels=0, world_size=world_size, text=text)

    def __post_init__(self) -> None:
        if self.height < self.world_size:
            raise InvalidRequest(
                f"an image of {self.height} tokens is too small for {self.world_size} patches", param="height"
            )

    def whole(self, stream: Stream) -> int:
        """Tokens of a stream that are dealt to the ranks."""
        return self._bounds[stream][-1]

    def tokens(self, stream: Stream, rank: int) -> tuple[int, int]:
        """The tokens [start, stop) of a stream that `rank` owns."""
        bounds = self._bounds[stream]
        return bounds[rank], bounds[rank + 1]

    def buffers_of(self, rank: int) -> Hashable:
        # Sequences of as many tokens share buffers, so that of two ranks the one with fewer may need more.
        return tuple(counts[rank] for counts in self._counts.values())

    def of_sequence(self, sequence: Sequence) -> tuple[int, ...]:
        """Numbers of tokens of a sequence that each rank owns."""
        return self._counts[sequence]

    @cached_property
    def _bounds(self) -> dict[Stream, tuple[int, ...]]:
        """Where each rank's tokens of a stream begin, and where the last one's end."""
        bounds, before, tokens = dict[Stream, tuple[int, ...]](), (0,) * (self.world_size + 1), 0
        streams: dict[Stream, int] = {"image": self.height, "references": self.references, "text": self.text}
        for stream, count in streams.items():
            tokens += count
            together = _boundaries(tokens, self.world_size)
            bounds[stream] = tuple(of_all - rest for of_all, rest in zip(together, before, strict=True))
            before = together
        return bounds

    @cached_property
    def _counts(self) -> dict[Sequence, tuple[int, ...]]:
        streams = get_args(Stream)
        counts: dict[Sequence, tuple[int, ...]] = {
            stream: tuple(stop - start for start, stop in pairwise(self._bounds[stream]))
            for stream in streams
        }
        joint = zip(*(counts[stream] for stream in streams), strict=True)
        return {**counts, "joint": tuple(map(sum, joint))}


def dealt(count: int, ranks: int) -> tuple[int, ...]:
    """How many of so many each rank gets; the first get one more."""
    return tuple(stop - start for start, stop in pairwise(_boundaries(count, ranks)))


@cache  # layers ask in every step
def dealt_heads(attention: AttentionMode, heads: int, ranks: int) -> tuple[int, ...] | None:
    """How many heads of a layer of attention each rank gets; None where keys and values are gathered.

    Args:
        heads: of keys and values.

    Raises:
        InvalidRequest: they are fewer than the ranks, and are to be dealt.
    """
    if attention == "ulysses" and heads < ranks:
        raise InvalidRequest(
            f"attention='ulysses' cannot deal {heads} heads to {ranks} ranks; use 'auto'", "gang_size"
        )
    each = dealt(heads, ranks)
    # Two ranks send as much either way, and one message is better than two.
    sends_less = 2 < ranks <= heads and each[0] * ranks <= MOST_HEADS * heads
    return each if attention == "ulysses" or (attention == "auto" and sends_less) else None


def _boundaries(count: int, ranks: int) -> tuple[int, ...]:
    """Where each rank's part of so many begins, and the last one's ends; the first get one more."""
    each, extra = divmod(count, ranks)
    return tuple(rank * each + min(rank, extra) for rank in range(ranks + 1))


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return max(a[0], b[0]), min(a[1], b[1])
