"""A convolution's input between its halo rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distriray.parallel.exchange.halos import PaddedPatch
from distriray.parallel.partition import Partition, Window


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (7, 1)])
def test_patches_between_their_halos_convolve_as_the_whole(
    kernel: int, stride: int, memory_format: torch.memory_format
) -> None:
    """Also twice in the same buffers, and where a halo is higher than the neighbour's patch."""
    generator = torch.Generator().manual_seed(0)
    partition = Partition(height=5, width=6, levels=1, world_size=3)  # patches of 2, 2 and 1 rows
    window = Window(kernel, stride, 1, (kernel // 2, kernel // 2))
    weight = torch.randn((4, 3, kernel, kernel), generator=generator)
    patches: list[PaddedPatch] = []
    for _ in range(2):
        image = torch.randn((2, 3, 5, 6), generator=generator).to(memory_format=memory_format)
        parts = [image[:, :, slice(*partition.rows(rank))] for rank in range(3)]
        parts = [part.contiguous(memory_format=memory_format) for part in parts]
        patches = patches or [PaddedPatch(partition, rank, part, window) for rank, part in enumerate(parts)]
        sends = [patch.sends(part) for patch, part in zip(patches, parts, strict=True)]
        outputs = []
        for rank, (patch, part) in enumerate(zip(patches, parts, strict=True)):
            received = {peer: rows[rank] for peer, rows in enumerate(sends) if rank in rows}
            whole = patch.fill(part, received)
            assert whole.is_contiguous(memory_format=memory_format)
            around = patch.around(received)
            between = around.put(part, around.room(part))
            around.clear_zeros(between)
            assert torch.equal(between, whole) and between.stride() == whole.stride()
            assert patch.nbytes == whole.nbytes
            outputs.append(F.conv2d(whole, weight, stride=stride, padding=(0, kernel // 2)))
        expected = F.conv2d(image, weight, stride=stride, padding=kernel // 2)
        torch.testing.assert_close(torch.cat(outputs, 2), expected)
