"""Who owns which rows, and who needs whose."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from distriray.errors import InvalidRequest, UnsupportedModel
from distriray.parallel.partition import Partition, Window

partitions = st.builds(
    lambda levels, ranks, extra, width: Partition((ranks - 1) * 2**levels + 1 + extra, width, levels, ranks),
    st.integers(0, 3),
    st.integers(1, 9),
    st.integers(0, 60),
    st.integers(3, 20),
)


def test_uneven_units_are_dealt_to_the_first_ranks() -> None:
    partition = Partition(height=48, width=8, levels=2, world_size=8)
    assert [stop - start for start, stop in map(partition.rows, range(8))] == [8, 8, 8, 8, 4, 4, 4, 4]


@given(partitions)
def test_patches_tile_every_level(partition: Partition) -> None:
    for level in range(partition.levels + 1):
        rows = [partition.rows(rank, level) for rank in range(partition.world_size)]
        assert rows[0][0] == 0 and rows[-1][1] == partition.shape(level)[0]
        assert all(a[1] == b[0] for a, b in zip(rows, rows[1:], strict=False))
        assert all(start < stop for start, stop in rows)


@given(partitions, st.sampled_from([(3, 1), (5, 1), (7, 1), (3, 2), (5, 2)]))
def test_convolution_of_patches_with_halos_equals_that_of_the_whole(
    partition: Partition, shape: tuple[int, int]
) -> None:
    kernel, stride = shape
    padding = kernel // 2
    window = Window(kernel, stride, 1, (padding, padding))
    level = 0
    if stride == 2 and partition.levels == 0:
        return
    generator = torch.Generator().manual_seed(0)
    height, width = partition.shape(level)
    image = torch.randn((1, 2, height, width), generator=generator, dtype=torch.float64)
    weight = torch.randn((2, 2, kernel, kernel), generator=generator, dtype=torch.float64)
    whole = F.conv2d(image, weight, stride=stride, padding=padding)
    parts = []
    for rank in range(partition.world_size):
        halo = partition.halo(rank, level, window)
        start, stop = partition.rows(rank, level)
        pieces = [image.new_zeros((1, 2, halo.zeros[0], width))]
        for peer, count in sorted(halo.receive.items()):
            if peer == rank + 1 or (peer > rank and peer == min(p for p in halo.receive if p > rank)):
                pieces.append(image[:, :, start:stop])
            first, last = partition.halo(peer, level, window).send[rank]
            offset = partition.rows(peer, level)[0]
            assert last - first == count
            pieces.append(image[:, :, offset + first : offset + last])
        if not any(peer > rank for peer in halo.receive):
            pieces.append(image[:, :, start:stop])
        pieces.append(image.new_zeros((1, 2, halo.zeros[1], width)))
        parts.append(F.conv2d(torch.cat(pieces, 2), weight, stride=stride, padding=(0, padding)))
    torch.testing.assert_close(torch.cat(parts, 2), whole)


def test_too_small_a_height_names_the_smallest_that_works() -> None:
    with pytest.raises(InvalidRequest, match="smallest that works has 29 rows"):
        Partition(height=28, width=8, levels=2, world_size=8)
    assert Partition(height=29, width=8, levels=2, world_size=8).units == 8


def test_a_convolution_that_leaves_the_levels_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="no level"):
        Partition(16, 16, 2, 2).halo(0, 0, Window(3, 1, 1, (0, 0)))
