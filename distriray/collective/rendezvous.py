"""The meeting of a gang's ranks in a store."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch.distributed import PrefixStore, Store, TCPStore

from distriray.collective.store import open_store, share_store
from distriray.errors import GangBroken, GangMismatch

Joined = TypeVar("Joined")


@dataclass
class Rendezvous:
    """The way of one rank into its gang. `connect` documents the attributes.

    Attributes:
        backend: the one that was asked for, or None for the best that there is.
    """

    rank: int
    world_size: int
    device: torch.device
    timeout_s: float
    name: str
    address: str | None
    store: Store | None
    backend: str | None
    _enrolled: Store | None = field(default=None, init=False)

    def meet(self, backend: str, join: Callable[[Store, str], Joined]) -> Joined:
        """Enrol this rank, if it is not, then return `join(store, interface)`.

        `store` holds nothing but this gang's entries for `backend`; `interface` is the address at which peers
        reach this machine.

        Raises:
            BackendUnavailable, GangBroken, GangMismatch, ValueError: see `connect`.
        """
        if self._enrolled is None:
            fresh = PrefixStore(self.name, self._opened())
            with self._answering():
                self._enroll(fresh)
            self._enrolled = fresh
        gang = self._enrolled
        try:
            with self._answering():
                return join(PrefixStore(backend, gang), _interface_towards(gang))
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

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except torch.distributed.DistError as error:
            raise GangBroken(f"the store where gang {self.name!r} meets does not answer: {error}") from error

    def _enroll(self, gang: Store) -> None:
        rank, name = self.rank, self.name
        agreed = int(gang.compare_set("world size", "", str(self.world_size)))
        if agreed != self.world_size:
            raise GangMismatch(
                f"rank {rank} expects {self.world_size} ranks in gang {name!r}, its peers {agreed}"
            )
        ours = "the default" if self.backend is None else repr(self.backend)
        theirs = gang.compare_set("backend", "", ours).decode()
        if theirs != ours:
            raise GangMismatch(
                f"rank {rank} asks for backend {ours} in gang {name!r}, its peers for {theirs}"
            )
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
