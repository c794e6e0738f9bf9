"""The meeting of a gang's ranks in a store."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.distributed import PrefixStore, Store, TCPStore

from distriray.collective.store import open_store, share_store
from distriray.errors import GangBroken, GangMismatch

Joined = TypeVar("Joined")


@dataclass(frozen=True)
class Rendezvous:
    """The way of one rank into its gang. `connect` documents the attributes."""

    rank: int
    world_size: int
    device: torch.device
    timeout_s: float
    name: str
    address: str | None = None
    store: Store | None = None

    def meet(self, join: Callable[[Store, str], Joined]) -> Joined:
        """Enrol this rank, then return `join(store, interface)`.

        `store` holds nothing but this gang's entries; `interface` is the address at which peers reach this
        machine.

        Raises:
            GangBroken, GangMismatch, ValueError: see `connect`.
        """
        store = self._opened()
        gang = PrefixStore(self.name, store)
        try:
            _enroll(gang, self.name, self.rank, self.world_size)
            return join(gang, _interface_towards(store))
        except torch.distributed.DistError as error:
            raise GangBroken(f"the store where gang {self.name!r} meets does not answer: {error}") from error
        except GangBroken as error:
            absent = _absent(gang, self.world_size)
            if absent:
                late = f"ranks {absent} of gang {self.name!r} did not join within {self.timeout_s:g} s"
                raise GangBroken(late) from error
            raise

    def _opened(self) -> Store:
        if self.store is not None:
            return self.store
        if self.address is None:
            raise ValueError("pass an address ('host:port', where rank 0 serves a store) or a store")
        return (share_store if self.rank == 0 else open_store)(self.address, timeout_s=self.timeout_s)


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
        return []  # the store is gone, and with it the list


def _interface_towards(store: Store) -> str:
    """The address of the interface that leads from this machine to the store; peers reach this rank there."""
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
