"""Joining a gang."""

from __future__ import annotations

import logging
from itertools import pairwise

import torch
from torch.distributed import Store

from distriray.collective.base import Communicator
from distriray.collective.registry import backends_named
from distriray.collective.rendezvous import Rendezvous
from distriray.errors import BackendUnavailable

log = logging.getLogger(__name__)


def connect(
    backend: str | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    address: str | None = None,
    store: Store | None = None,
    timeout_s: float = 30.0,
    device: torch.device | str | None = None,
    name: str = "gang",
) -> Communicator:
    """Join the gang `name` as `rank` and return once all of its ranks have joined.

    Args:
        backend: `local` (one rank, any device), `shm` (CPU tensors, ranks of one machine), `gloo` (CPU
            tensors over TCP) or `nccl` (CUDA tensors). Unless given, the first of these that moves tensors on
            `device` among these ranks, which agree on it: with CPU tensors, `gloo` where they cannot share
            memory. The communicator's `backend` says which it is.
        rank: this process's place in the gang, from 0.
        world_size: the number of ranks.
        address: `host:port` where rank 0 serves a store that the others join, or where one is served already.
            Rank 0 listens on that host's address alone. In `host:port/key` the key, any text that the ranks
            share, keeps the gang's entries apart from those of processes that do not know it.
        store: an existing store, in place of `address`.
        timeout_s: how long joining may take, and later each wait.
        device: of the tensors; the CPU, or for `nccl` the current CUDA device, unless given.
        name: tells gangs that share a store apart. A name can be used only once: gang and generation both
            belong in it.

    A store that rank 0 serves at `address` lives until its last communicator there is closed. To join again
    at the same address after a failure, rank 0 connects under the new name first and then closes the old one.

    Raises:
        BackendUnavailable: the ranks cannot share memory, and `shm` was asked for.
        GangBroken: not all ranks arrived within `timeout_s`.
        GangMismatch: the ranks disagree on the world size or the backend, or two claim the same rank.
        ModuleNotFoundError: `nccl` without CuPy.
        ValueError: an argument is out of range or missing.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not within a gang of {world_size}")
    found, place = backends_named(backend, device, world_size)
    rendezvous = Rendezvous(rank, world_size, place, timeout_s, name, address, store, backend)
    for preferred, following in pairwise(found):
        try:
            return found[preferred].join(rendezvous)
        except BackendUnavailable as error:
            if rank == 0:
                log.warning("%s; it uses %r", error, following)
    *_, last = found.values()
    return last.join(rendezvous)
