"""Weights of extrapolation fitted to an image, by Triton: two launches, which read every number once each.

Parts of what is received are cut into blocks, a program's each. The first launch sums what a weight follows
from, block by block; the second one adds that of a part's blocks up, and extrapolates.
"""
# mypy: allow-untyped-defs
# Triton evaluates the annotations of a kernel's arguments, so all but constants have none.

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

_BLOCK = 2048
_WARPS = 4
_VECTOR = 8  # numbers of 16 bits that a load takes at once
_SUMS = 64  # of a part's blocks, that are read at once


class Fit:
    """`FittedWeights`.

    The sums are of blocks, not of parts: a program then writes no number that another one reads.
    """

    def __init__(self, received: torch.Tensor, parts: Sequence[int]) -> None:
        width, stride = received.shape[1], received.stride(0)
        self._unit = math.gcd(_VECTOR, width, stride, *parts)  # what all parts begin and end at multiples of
        blocks = list(_blocks(width, stride, parts, self._unit))
        self._blocks = torch.tensor(blocks, dtype=torch.int32, device=received.device)
        self.sums = torch.zeros((len(blocks), 2), device=received.device)

    def extrapolate(
        self, received: torch.Tensor, before: torch.Tensor, change: torch.Tensor, forgetting: float
    ) -> None:
        """`FittedWeights.extrapolate`."""
        grid, constants = (len(self.sums),), {"UNIT": self._unit, "BLOCK": _BLOCK, "num_warps": _WARPS}
        with torch.cuda.device_of(received):
            _add[grid](received, before, change, self._blocks, self.sums, forgetting, **constants)
            _extrapolate[grid](received, before, change, self._blocks, self.sums, SUMS=_SUMS, **constants)


def _blocks(
    width: int, stride: int, parts: Sequence[int], unit: int
) -> Iterator[tuple[int, int, int, int, int]]:
    """What a program knows of its block, in units.

    Yields:
        Its start where values arrive, in rows of a `stride`; its start where rows are behind one another; its
        numbers; and the first block of its part, and the one after the last.
    """
    start, known = 0, 0
    for part in parts:
        stop = known + triton.cdiv(part, _BLOCK)
        for first in range(start, start + part, _BLOCK):
            row, column = divmod(first, width)
            count = min(start + part - first, _BLOCK)
            yield (row * stride + column) // unit, first // unit, count // unit, known, stop
        start, known = start + part, stop


@triton.jit
def _places(block, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Where a block's numbers arrive, where they are behind one another, and which there are."""
    number = tl.arange(0, BLOCK)
    arrive, lie = tl.load(block).to(tl.int64) * UNIT, tl.load(block + 1).to(tl.int64) * UNIT
    return arrive + number, lie + number, number < tl.load(block + 2) * UNIT


@triton.jit
def _last(received, before, arrive, lie, inside):
    """The values of a block, and their last change in the digits in which it is kept."""
    values = tl.load(received + arrive, mask=inside, other=0.0)
    change = values.to(tl.float32) - tl.load(before + lie, mask=inside, other=0.0).to(tl.float32)
    return values.to(tl.float32), change.to(values.dtype)


@triton.jit
def _add(received, before, change, blocks, sums, forgetting, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Add the last change of one block to what is known of the steps."""
    block = tl.program_id(0)
    arrive, lie, inside = _places(blocks + block * 5, UNIT, BLOCK)
    _, last = _last(received, before, arrive, lie, inside)
    earlier = tl.load(change + lie, mask=inside, other=0.0).to(tl.float32)
    known = sums + block * 2
    tl.store(known, tl.sum(last.to(tl.float32) * earlier, 0) + forgetting * tl.load(known))
    tl.store(known + 1, tl.sum(earlier * earlier, 0) + forgetting * tl.load(known + 1))


@triton.jit
def _extrapolate(
    received,
    before,
    change,
    blocks,
    sums,
    SUMS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Extrapolate one block by the weight of its part, and keep its last change."""
    block = blocks + tl.program_id(0) * 5
    follows = tl.zeros([SUMS], dtype=tl.float32)
    squares = tl.zeros([SUMS], dtype=tl.float32)
    first, stop = tl.load(block + 3), tl.load(block + 4)
    for begin in range(first, stop, SUMS):
        other = begin + tl.arange(0, SUMS)
        follows += tl.load(sums + other * 2, mask=other < stop, other=0.0)
        squares += tl.load(sums + other * 2 + 1, mask=other < stop, other=0.0)
    weight = tl.sum(follows, 0) / tl.sum(squares, 0)
    weight = tl.where(weight > 0.0, tl.minimum(weight, 1.0), 0.0)  # 0 / 0 where nothing changed: 0

    arrive, lie, inside = _places(block, UNIT, BLOCK)
    values, last = _last(received, before, arrive, lie, inside)
    tl.store(before + lie, (values + weight * last.to(tl.float32)).to(last.dtype), mask=inside)
    tl.store(change + lie, last, mask=inside)
