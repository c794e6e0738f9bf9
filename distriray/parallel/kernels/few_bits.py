"""Form of a message of numbers in few bits."""

from __future__ import annotations

GROUP = 32
"""Consecutive numbers that share a scale."""
SCALE_BYTES = 2
"""Of a group's scale, a bfloat16: it goes before the group's numbers."""


def groups_of(numbers: int) -> int:
    """Groups of so many numbers; the last one may be filled up with zeros."""
    return -(-numbers // GROUP)


def packed_bytes(bits: int) -> int:
    """Of a group's numbers: the first of them are in the lowest bits, the last in the highest."""
    return GROUP * bits // 8


def message_bytes(numbers: int, bits: int) -> int:
    """Of a message of so many numbers."""
    return groups_of(numbers) * (SCALE_BYTES + packed_bytes(bits))
