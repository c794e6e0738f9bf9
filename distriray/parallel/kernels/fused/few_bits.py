"""Changes in few bits by Triton: what is known and the values or the message are read once, in one launch."""
# mypy: allow-untyped-defs
# Triton evaluates the annotations of a kernel's arguments, so all but constants have none.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distriray.parallel.kernels.few_bits import SCALE_BYTES, groups_of, message_bytes, packed_bytes

_GROUPS = 64  # of a program
_WARPS = 4


def encode(values: torch.Tensor, known: torch.Tensor, bits: int) -> torch.Tensor:
    """`Kernels.encode`."""
    count = known.numel()
    message = torch.empty(message_bytes(count, bits), dtype=torch.uint8, device=known.device)
    with torch.cuda.device_of(known):
        _encode[_grid(count)](values.contiguous(), known, message, count, **_constants(bits))
    return message


def decode(message: torch.Tensor, known: torch.Tensor, bits: int, into: torch.Tensor | None = None) -> None:
    """`Kernels.decode`."""
    count = known.numel()
    fills = into is not None and into.is_contiguous()
    with torch.cuda.device_of(known):
        target = into if fills else known
        _decode[_grid(count)](message, known, target, count, FILLS=fills, **_constants(bits))
    if into is not None and not fills:
        into.copy_(known)


def _grid(count: int) -> tuple[int]:
    return (triton.cdiv(groups_of(count), _GROUPS),)


def _constants(bits: int) -> dict[str, int]:
    return {
        "BITS": bits,
        "LEVELS": 2**bits - 1,
        "PARTS": 8 // bits,
        "PACKED": packed_bytes(bits),
        "HEAD": SCALE_BYTES,
        "GROUPS": _GROUPS,
        "num_warps": _WARPS,
    }


@triton.jit
def _places(count, PARTS: tl.constexpr, PACKED: tl.constexpr, GROUPS: tl.constexpr):
    """This program's groups, and where their numbers are, (groups, numbers in a byte, bytes)."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    number = tl.arange(0, PARTS)[None, :, None] * PACKED + tl.arange(0, PACKED)[None, None, :]
    place = group[:, None, None] * (PARTS * PACKED) + number
    return group, place, place < count


@triton.jit
def _bytes(message, group, count, PARTS: tl.constexpr, PACKED: tl.constexpr, HEAD: tl.constexpr):
    """Where a message has the scales of some groups and their numbers, and whether there are such groups."""
    head = message + group * (HEAD + PACKED)
    return head, head[:, None] + HEAD + tl.arange(0, PACKED)[None, :], group * (PARTS * PACKED) < count


@triton.jit
def _sum(before, numbers, scale, LEVELS: tl.constexpr):
    """What both ends know once they have added these numbers: rounded once, as the product is exact."""
    return before + (numbers.to(tl.float32) - LEVELS / 2) * scale[:, None, None]


@triton.jit
def _encode(
    values,
    known,
    message,
    count,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    PARTS: tl.constexpr,
    PACKED: tl.constexpr,
    HEAD: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One message's bytes of some groups, and what is known once they have arrived."""
    group, place, inside = _places(count, PARTS, PACKED, GROUPS)
    before = tl.load(known + place, mask=inside, other=0.0).to(tl.float32)
    change = tl.load(values + place, mask=inside, other=0.0).to(tl.float32) - before

    largest = tl.max(tl.max(tl.abs(change), 2), 1)
    undefined = tl.max(tl.max((change != change).to(tl.int32), 2), 1)  # a maximum passes over NaN
    # Rounded to bfloat16 by hand, which the interpreter does not: the even one of two that are as near.
    exact = (largest * (2.0 / LEVELS)).to(tl.int32, bitcast=True)
    rounded = (exact + 0x7FFF + ((exact >> 16) & 1)) >> 16
    rounded = tl.where(undefined > 0, 0x7FC0, rounded)
    scale = (rounded << 16).to(tl.float32, bitcast=True)
    inverse = tl.where(scale > 0, 1.0 / scale, 0.0)[:, None, None]
    numbers = tl.minimum(tl.maximum(change * inverse + (LEVELS + 1) / 2, 0.0), LEVELS).to(tl.int32)

    after = _sum(before, numbers, scale, LEVELS)
    tl.store(known + place, after.to(known.dtype.element_ty), mask=inside)
    head, byte, there = _bytes(message, group, count, PARTS, PACKED, HEAD)
    tl.store(head, (rounded & 0xFF).to(tl.uint8), mask=there)
    tl.store(head + 1, (rounded >> 8).to(tl.uint8), mask=there)
    packed = tl.sum(numbers << (tl.arange(0, PARTS)[None, :, None] * BITS), 1)
    tl.store(byte, packed.to(tl.uint8), mask=there[:, None])


@triton.jit
def _decode(
    message,
    known,
    into,
    count,
    FILLS: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    PARTS: tl.constexpr,
    PACKED: tl.constexpr,
    HEAD: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """What is known of some groups once their bytes of a message have arrived."""
    group, place, inside = _places(count, PARTS, PACKED, GROUPS)
    head, byte, there = _bytes(message, group, count, PARTS, PACKED, HEAD)
    low = tl.load(head, mask=there, other=0).to(tl.int32)
    high = tl.load(head + 1, mask=there, other=0).to(tl.int32)
    scale = ((high << 24) | (low << 16)).to(tl.float32, bitcast=True)
    packed = tl.load(byte, mask=there[:, None], other=0).to(tl.int32)
    numbers = (packed[:, None, :] >> (tl.arange(0, PARTS)[None, :, None] * BITS)) & LEVELS

    before = tl.load(known + place, mask=inside, other=0.0).to(tl.float32)
    after = _sum(before, numbers, scale, LEVELS).to(known.dtype.element_ty)
    tl.store(known + place, after, mask=inside)
    if FILLS:
        tl.store(into + place, after, mask=inside)
