"""Stores in which the ranks of a gang find each other, served at one address and behind a key.

An address is `host:port` or `host:port/key`. With a key, all entries are kept under that prefix, so that a
process that does not know it writes beside them and not into them. The key is no password: see
`docs/decisions/stores-on-one-address.md`.
"""

from __future__ import annotations

import errno
import secrets
import socket
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Self

from torch.distributed import DistError, DistNetworkError, PrefixStore, Store, TCPStore

from distriray.errors import GangBroken


@dataclass(frozen=True)
class StoreAddress:
    """The place of a store; `str` leaves out the key, so that messages and logs do not hold it."""

    host: str
    port: int
    key: str = field(default="", repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `host:port` or `host:port/key`; an IPv6 host may stand in brackets."""
        place, _, key = text.partition("/")
        host, _, port = place.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"address {place!r} is not 'host:port' or 'host:port/key'")
        return cls(host.strip("[]"), int(port), key)

    @property
    def text(self) -> str:
        """The text that `parse` reads, key included."""
        return f"{self}/{self.key}" if self.key else str(self)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def guarded(self, store: Store) -> Store:
        """The part of `store` that belongs to this address's key."""
        return PrefixStore(self.key, store) if self.key else store


@dataclass(frozen=True)
class ServedStore:
    """A store that this process serves for as long as it holds `store`.

    Attributes:
        store: for this process's own use.
        address: `host:port/key`, for `connect` and `open_store` in other processes.
    """

    store: Store
    address: str = field(repr=False)


def serve_store(host: str, port: int = 0, *, timeout_s: float = 30.0) -> ServedStore:
    """Serve a new store on `host` alone, behind a key that cannot be guessed.

    Args:
        host: one address of this machine, or a name of it. Only there are connections accepted: with
            `127.0.0.1`, none from other machines.
        port: 0 takes a free one.
        timeout_s: bound on each operation of this process on the store.

    Raises:
        OSError: `host` is no address of this machine, or the port is taken.
    """
    listener = _listen(host, port)
    address = StoreAddress(host, listener.getsockname()[1], secrets.token_urlsafe(16))
    server = _serve(address, listener.detach(), timeout_s)
    return ServedStore(address.guarded(server), address.text)


def open_store(address: str, *, timeout_s: float = 30.0) -> Store:
    """Open the store that is served at `address`, waiting at most `timeout_s` for it.

    Raises:
        GangBroken: no store answers there.
        ValueError: `address` is not of the form `host:port` or `host:port/key`.
    """
    place = StoreAddress.parse(address)
    try:
        store = TCPStore(place.host, place.port, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
    except DistError as error:
        raise GangBroken(f"no store answers at {place}: is rank 0 running there?") from error
    return place.guarded(store)


def share_store(address: str, *, timeout_s: float) -> Store:
    """Serve the store at `address`, on that host alone, or open it where it is served already.

    Stores of one process at one port share a server, which ends with the last of them.

    Raises:
        GangBroken: the address can neither be served from here nor does a store answer there.
        ValueError: as `open_store`.
    """
    place = StoreAddress.parse(address)
    try:
        listening = _listen(place.host, place.port).detach()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return _open_elsewhere(address, error, timeout_s)
        listening = -1  # torch then takes this process's own server at that port, and starts none
    try:
        return place.guarded(_serve(place, listening, timeout_s))
    except DistNetworkError:
        return open_store(address, timeout_s=timeout_s)  # another process's: torchrun's agent, for one


def _open_elsewhere(address: str, why: OSError, timeout_s: float) -> Store:
    try:
        return open_store(address, timeout_s=timeout_s)
    except GangBroken as error:
        place = StoreAddress.parse(address)
        raise GangBroken(
            f"no store answers at {place}, and this machine cannot serve one there ({why.strerror}); name an "
            "address of the machine that runs rank 0"
        ) from error


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket that is bound to `host` and nothing else."""
    failure: OSError | None = None
    for family, *_, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        try:
            return socket.create_server(place, family=family, backlog=2048)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise  # not on another of the host's addresses, where the peers may not look
            failure = failure or error
    assert failure is not None
    raise failure


def _serve(address: StoreAddress, listening: int, timeout_s: float) -> Store:
    """A server on the socket `listening`. Left to itself, torch would listen on every interface."""
    return TCPStore(
        address.host,
        address.port,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listening,
        use_libuv=False,  # before torch 2.8 its libuv server takes no socket
    )
