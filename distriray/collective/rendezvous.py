"""How the ranks of a gang find each other."""

from __future__ import annotations

import socket
from typing import Literal

import torch
from torch.distributed import PrefixStore, Store, TCPStore

from distriray.collective.base import Communicator
from distriray.collective.gloo import GlooCommunicator
from distriray.collective.local import LocalCommunicator
from distriray.collective.nccl import NcclCommunicator, load_nccl
from distriray.collective.store import open_store, share_store
from distriray.errors import GangBroken, GangMismatch

Backend = Literal["local", "gloo", "nccl"]


def connect(
    backend: Backend,
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
        backend: `local` (one rank, any device), `gloo` (CPU tensors over TCP) or `nccl` (CUDA tensors).
        rank: this process's place in the gang, from 0.
        world_size: the number of ranks.
        address: `host:port` where rank 0 serves a store that the others join, or where one is served already.
        store: an existing store, in place of `address`.
        timeout_s: how long joining may take, and later each wait.
        device: of the tensors; the CPU, or for `nccl` the current CUDA device, unless given.
        name: tells gangs that share a store apart. A name serves once: gang and generation both belong in it.

    A store that rank 0 serves at `address` lives until its last communicator there is closed. To join again
    at the same address after a failure, rank 0 connects under the new name first and then closes the old one.

    Raises:
        GangBroken: not all ranks arrived within `timeout_s`.
        GangMismatch: the ranks disagree on the world size, or two claim the same rank.
        ModuleNotFoundError: `nccl` without CuPy.
        ValueError: an argument is out of range or missing.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not within a gang of {world_size}")
    if backend == "local":
        if world_size != 1:
            raise ValueError(f"backend 'local' is for one rank, not {world_size}; use 'gloo' or 'nccl'")
        return LocalCommunicator(device or "cpu")
    if backend not in ("gloo", "nccl"):
        raise ValueError(f"no backend {backend!r}; there are 'local', 'gloo' and 'nccl'")
    if backend == "gloo" and torch.device(device or "cpu").type != "cpu":
        raise ValueError(f"backend 'gloo' moves CPU tensors, not {device}; use 'nccl'")
    if backend == "nccl":
        load_nccl()
    if store is None:
        store = _store(address, rank, timeout_s)
    gang = PrefixStore(name, store)
    try:
        _enroll(gang, name, rank, world_size)
        gloo = GlooCommunicator(gang, rank, world_size, _interface_towards(store), timeout_s)
    except torch.distributed.DistError as error:
        raise GangBroken(f"the store where gang {name!r} meets does not answer: {error}") from error
    except GangBroken as error:
        absent = _absent(gang, world_size)
        if absent:
            late = f"ranks {absent} of gang {name!r} did not join within {timeout_s:g} s"
            raise GangBroken(late) from error
        raise
    if backend == "gloo":
        return gloo
    return NcclCommunicator(gloo, device or "cuda", timeout_s)


def _store(address: str | None, rank: int, timeout_s: float) -> Store:
    if address is None:
        raise ValueError("pass an address ('host:port', where rank 0 serves a store) or a store")
    return (share_store if rank == 0 else open_store)(address, timeout_s=timeout_s)


def _enroll(gang: Store, name: str, rank: int, world_size: int) -> None:
    agreed = int(gang.compare_set("world size", "", str(world_size)))
    if agreed != world_size:
        raise GangMismatch(f"rank {rank} expects {world_size} ranks in gang {name!r}, its peers {agreed}")
    if gang.add(f"rank {rank}", 1) > 1:
        raise GangMismatch(
            f"rank {rank} of gang {name!r} is taken; give every process a rank, every gang a name"
        )


def _absent(gang: Store, world_size: int) -> list[int]:
    try:
        return [rank for rank in range(world_size) if not gang.check([f"rank {rank}"])]
    except torch.distributed.DistError:
        return []  # the store is gone: nobody knows


def _interface_towards(store: Store) -> str:
    """The address of the interface from which this machine reaches the store, where peers reach us too."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if not isinstance(store, TCPStore):
        return "127.0.0.1"
    for family, kind, protocol, _, target in socket.getaddrinfo(
        store.host, store.port, type=socket.SOCK_DGRAM
    ):
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(target)  # sends nothing: only asks for the route
            except OSError:
                continue
            return str(probe.getsockname()[0])
    raise GangBroken(f"no route to the store at {store.host}:{store.port}; set GLOO_SOCKET_IFNAME")
