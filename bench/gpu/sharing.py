"""Several ranks on one GPU, which NCCL refuses unless it is told otherwise."""

from __future__ import annotations

from collections.abc import Mapping

SWITCH_SINCE = 23000
"""The NCCL from which two ranks of one machine may have the same GPU, if they ask."""


def has_switch() -> bool:
    """Whether the NCCL that CuPy finds lets two ranks share a GPU."""
    from cupy.cuda import nccl

    return bool(nccl.get_version() >= SWITCH_SINCE)


def sharing_environment(machine: str | None) -> Mapping[str, str]:
    """Variables of a rank's process that shares a GPU, to be set before it joins its first gang.

    Args:
        machine: the name of the machine that this rank claims to be, one for each: bytes then go over
            sockets. None asks for NCCL's switch instead.
    """
    common = {"NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "4", "NCCL_SOCKET_IFNAME": "lo"}
    if machine is None:
        return {**common, "NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    return {**common, "NCCL_HOSTID": machine, "NCCL_NET": "Socket", "NCCL_IB_DISABLE": "1"}
