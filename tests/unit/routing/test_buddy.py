"""Leases of aligned blocks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distriray.routing.buddy import (
    BuddyAllocator,
    InvalidGangSizes,
    WorkersUnavailable,
    aligned_blocks,
    check_gang_sizes,
)

SIZES = st.sampled_from([(1,), (2,), (1, 2, 4, 8), (1, 3, 6), (2, 8)])


def test_blocks_of_four_workers():
    assert aligned_blocks(4, (1, 2, 4)) == ((0, 1, 2, 3), (0, 1), (2, 3), (0,), (1,), (2,), (3,))


@pytest.mark.parametrize("sizes", [(), (0,), (2, 3), (2, 1), (2, 2)])
def test_sizes_that_do_not_nest_are_refused(sizes):
    with pytest.raises(InvalidGangSizes, match="do not nest"):
        check_gang_sizes(sizes)


def test_small_leases_leave_large_blocks_whole():
    blocks = BuddyAllocator(range(8), (1, 2, 4, 8))
    assert blocks.lease(4) == (0, 1, 2, 3)
    assert blocks.lease(1) == (4,)
    assert blocks.lease(1) == (5,)
    assert blocks.lease(2) == (6, 7)
    assert blocks.lease(1) is None


def test_all_sizes_pack_when_the_largest_go_first():
    blocks = BuddyAllocator(range(8), (1, 2, 4, 8))
    assert all(blocks.lease(size) for size in (4, 2, 1, 1))


def test_what_is_leased_or_dead_cannot_be_taken():
    blocks = BuddyAllocator(range(2), (1, 2))
    blocks.take((0,))
    with pytest.raises(WorkersUnavailable, match=r"\[0\] are leased or dead"):
        blocks.take((0, 1))
    assert blocks.free == {1}


@given(SIZES, st.sets(st.integers(0, 11)), st.lists(st.integers(0, 11), max_size=20))
def test_no_worker_is_ever_lent_twice(sizes, healthy, numbers):
    blocks, free = BuddyAllocator(healthy, sizes), set(healthy)
    for number in numbers:
        size = sizes[number % len(sizes)]
        block = blocks.lease(size)
        if block is None:
            assert not any(free.issuperset(b) for b in aligned_blocks(12, sizes) if len(b) == size)
        else:
            assert block in aligned_blocks(12, sizes) and free.issuperset(block)
            free.difference_update(block)
        assert blocks.free == free
