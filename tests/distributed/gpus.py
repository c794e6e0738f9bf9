"""GPUs for the ranks of a test, also where there are fewer GPUs than ranks."""

from __future__ import annotations

import os

import torch

from bench.gpu.sharing import has_switch, sharing_environment


def gpu_of(rank: int, world_size: int) -> torch.device:
    """The GPU of a rank, to be asked for in its process before it joins its first gang."""
    count = torch.cuda.device_count()
    if count < world_size:
        two_each = has_switch() and world_size <= 2 * count
        os.environ.update(sharing_environment(None if two_each else f"rank{rank}"))
    return torch.device("cuda", rank % count)
