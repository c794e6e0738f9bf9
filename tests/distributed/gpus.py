"""GPUs for the ranks of a test, also where there are fewer GPUs than ranks."""

from __future__ import annotations

import os

import torch

SHARING_VERSION = 23000
"""The NCCL from which two ranks of one machine may have the same GPU, if they ask."""


def gpu_of(rank: int, world_size: int) -> torch.device:
    """The GPU of a rank, to be asked for in its process before it joins its first gang.

    Where ranks must share, this sets what NCCL wants for it: from 2.30 a switch for two ranks a GPU, and
    otherwise each rank claims to be a machine of its own, whose bytes go over sockets.
    """
    from cupy.cuda import nccl

    count = torch.cuda.device_count()
    if count < world_size:
        os.environ.update(NCCL_NVLS_ENABLE="0", NCCL_MAX_CTAS="4", NCCL_SOCKET_IFNAME="lo")
        if nccl.get_version() >= SHARING_VERSION and world_size <= 2 * count:
            os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
        else:
            os.environ.update(NCCL_HOSTID=f"rank{rank}", NCCL_NET="Socket", NCCL_IB_DISABLE="1")
    return torch.device("cuda", rank % count)
