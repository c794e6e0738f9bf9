"""Rings in shared memory, both ends in one process."""

from __future__ import annotations

import mmap
import os
import random
from collections import deque
from collections.abc import Iterator

import numpy as np
import pytest

from distriray.collective import ring
from distriray.collective.ring import SPAN, UNIT, Reader, SizeMismatch, Transfer, Writer

PAGE = mmap.PAGESIZE


@pytest.fixture
def descriptor() -> Iterator[int]:
    descriptor = os.memfd_create("ring")
    os.ftruncate(descriptor, 2 * SPAN)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def ends(descriptor: int) -> tuple[Writer, Reader]:
    """Each with a mapping of its own, as in two processes; behind another ring."""
    writer, reader = (mmap.mmap(descriptor, 2 * SPAN) for _ in range(2))
    return Writer(writer, SPAN), Reader(reader, SPAN)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "SMALLEST", PAGE)
    monkeypatch.setattr(ring, "LARGEST", 4 * PAGE)
    monkeypatch.setattr(ring, "PIECE", 3 * UNIT)


def message(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8)


def sent(data: np.ndarray) -> Transfer:
    return Transfer(1, True, data)


def awaited(length: int) -> Transfer:
    return Transfer(0, False, np.zeros(length, np.uint8))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("seed", range(20))
def test_messages_of_all_sizes_come_out_as_they_went_in(seed: int, ends: tuple[Writer, Reader]) -> None:
    """Round the ring's end, through its growth and beyond its largest size, the ends moving in any order."""
    writer, reader = ends
    dice = random.Random(seed)
    bound = dice.choice([3 * UNIT, PAGE // 2, 10 * PAGE])
    lengths = [dice.randint(1, bound) for _ in range(100)]
    going = deque(sent(message(length, index)) for index, length in enumerate(lengths))
    coming = [awaited(length) for length in lengths]
    queue, idle = deque(coming), 0
    while queue:
        if dice.random() < 0.5:
            moved = bool(going) and writer.push(going[0])
            if going and going[0].over:
                going.popleft()
        else:
            moved = reader.pull(queue[0])
            if queue[0].over:
                queue.popleft()
        idle = 0 if moved else idle + 1
        assert idle < 100, "both ends wait for each other"
    for index, transfer in enumerate(coming):
        assert np.array_equal(transfer.data, message(lengths[index], index))


@pytest.mark.usefixtures("small")
def test_a_ring_holds_what_fits_into_its_largest_size_and_the_rest_follows(
    ends: tuple[Writer, Reader],
) -> None:
    writer, reader = ends
    going, coming = sent(message(6 * PAGE)), awaited(6 * PAGE)
    assert writer.push(going) and not writer.push(going)
    assert going.done == 4 * PAGE - 2 * UNIT  # beside the message's record and one in reserve
    assert reader.pull(coming) and not reader.pull(coming) and not coming.over
    assert writer.push(going) and going.over
    assert reader.pull(coming) and coming.over
    assert np.array_equal(coming.data, going.data)


def test_a_ring_takes_the_memory_of_what_was_on_its_way_at_once(
    ends: tuple[Writer, Reader], descriptor: int
) -> None:
    writer, reader = ends

    def memory() -> int:
        return 512 * os.fstat(descriptor).st_blocks

    def through(length: int) -> None:
        going, coming = sent(message(length)), awaited(length)
        assert writer.push(going) and reader.pull(coming) and coming.over

    for _ in range(100):
        through(100_000)
    assert memory() <= ring.SMALLEST + PAGE
    through(5_000_000)
    for _ in range(100):
        through(400_000)
    assert memory() <= (8 << 20) + PAGE  # the smallest size was given back


def test_another_size_than_expected_is_told_before_a_byte_is_copied(ends: tuple[Writer, Reader]) -> None:
    writer, reader = ends
    assert writer.push(sent(message(100)))
    coming = awaited(50)
    with pytest.raises(SizeMismatch, match="rank 0 sent 100 bytes where 50 were expected"):
        reader.pull(coming)
    assert not coming.data.any()


def test_nothing_is_read_before_something_was_written(ends: tuple[Writer, Reader]) -> None:
    assert not ends[1].pull(awaited(10))
