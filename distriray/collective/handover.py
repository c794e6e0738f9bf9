"""Memory without a name, handed from process to process of one machine."""

from __future__ import annotations

import json
import mmap
import os
import platform
import secrets
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple, Self

PROCESSORS = ("x86_64",)
"""Those on which the order of loads and stores between processes was tested."""

PATIENCE_S = 1.0
"""Time for a visitor to show a key."""

ASK_EVERY_S = 0.1
"""While a rank waits for visitors, it asks so often whether one has given up."""

_MFD_NOEXEC_SEAL = 8  # since Linux 6.3, where an administrator may demand it; Python does not name it yet
_KEY_BYTES = 16


class Card(NamedTuple):
    """Address of a rank, by which its peers find its door and open it.

    Attributes:
        obstacle: why this process cannot share memory, or "".
        whereabouts: what processes must have in common to do so, by name.
        door: the name of its socket.
        key: hexadecimal; whoever knocks shows it.
    """

    obstacle: str
    whereabouts: dict[str, str]
    door: str
    key: str

    @classmethod
    def parse(cls, text: str) -> Self:
        return cls(*json.loads(text))

    @property
    def text(self) -> str:
        return json.dumps(self)


class Tie(NamedTuple):
    """Connection of two processes: shared memory, and a connection that ends with either of them."""

    connection: socket.socket
    memory: mmap.mmap


class Door:
    """A socket at which peers of higher rank are given memory. It has no file that could be left behind.

    Attributes:
        card: for the peers.
    """

    def __init__(self, world_size: int) -> None:
        name, key = f"distriray-{secrets.token_hex(16)}", secrets.token_hex(_KEY_BYTES)
        self._socket: socket.socket | None = None
        try:
            self.card = Card(_obstacle(), {}, name, key)
            if not self.card.obstacle:
                self.card = self.card._replace(whereabouts=_whereabouts())
                self._socket = socket.socket(socket.AF_UNIX)
                self._socket.bind(f"\0{name}")
                self._socket.listen(world_size)
        except OSError as error:
            self.card = Card(f"cannot meet its peers: {error}", {}, name, key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def ties(
        self, rank: int, cards: Sequence[Card], nbytes: int, deadline: float, given_up: Callable[[], bool]
    ) -> dict[int, Tie]:
        """Tie this rank to every other, each giving `nbytes` of memory, all zero, to those above it.

        Whatever comes of it, the door is closed then: nobody waits for a rank that failed.

        Args:
            deadline: on the monotonic clock.
            given_up: whether a peer has; asked while this rank waits for visitors, who may then not come.

        Raises:
            TimeoutError: a peer did not come.
            OSError: memory cannot be made or handed over.
        """
        ties: dict[int, Tie] = {}
        with self, ExitStack() as undo:
            called = {peer: undo.enter_context(_knock(rank, cards[peer], deadline)) for peer in range(rank)}
            for peer, visitor in self._visitors(rank, len(cards), deadline, given_up):
                undo.enter_context(visitor)
                ties[peer] = Tie(visitor, _give(visitor, nbytes))
            for peer, connection in called.items():
                connection.settimeout(_remaining(deadline))
                ties[peer] = Tie(connection, _take(connection, nbytes))
            undo.pop_all()
        return ties

    def _visitors(
        self, rank: int, world_size: int, deadline: float, given_up: Callable[[], bool]
    ) -> Iterator[tuple[int, socket.socket]]:
        """Every peer of higher rank, as they come; strangers are sent away."""
        assert self._socket is not None
        awaited = set(range(rank + 1, world_size))
        while awaited:
            self._socket.settimeout(min(ASK_EVERY_S, _remaining(deadline)))
            try:
                visitor, _ = self._socket.accept()
            except TimeoutError:
                if given_up():
                    raise ConnectionError("a peer gave up") from None
                if time.monotonic() > deadline:
                    raise TimeoutError(f"ranks {sorted(awaited)} did not come") from None
                continue
            peer = _identify(visitor, self.card.key)
            if peer not in awaited:
                visitor.close()
                continue
            awaited.remove(peer)
            yield peer, visitor


def obstacle_among(cards: Sequence[Card]) -> str:
    """Why ranks with these cards cannot share memory, or ""; every rank finds the same."""
    for rank, card in enumerate(cards):
        if card.obstacle:
            return f"rank {rank} {card.obstacle}"
    for what, ours in cards[0].whereabouts.items():
        others = [rank for rank, card in enumerate(cards) if card.whereabouts[what] != ours]
        if others:
            return f"ranks {others} have another {what} than rank 0"
    return ""


def _obstacle() -> str:
    if sys.platform != "linux":
        return f"runs on {platform.system()}; memory is handed over on Linux only"
    if platform.machine() not in PROCESSORS:
        tested = " and ".join(PROCESSORS)
        return f"runs on a processor {platform.machine()}; shared memory was tested on {tested} only"
    return ""


def _whereabouts() -> dict[str, str]:
    with open("/proc/sys/kernel/random/boot_id") as boot:
        machine = boot.read().strip()
    return {
        "machine": machine,
        "network namespace": os.readlink("/proc/self/ns/net"),
        "user namespace": os.readlink("/proc/self/ns/user"),
        "user": str(os.geteuid()),
    }


def _knock(rank: int, card: Card, deadline: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(_remaining(deadline))
        connection.connect(f"\0{card.door}")
        if _user_of(connection) != os.geteuid():
            raise PermissionError(f"the socket {card.door} belongs to another user")
        connection.sendall(bytes.fromhex(card.key) + struct.pack("i", rank))
    except BaseException:
        connection.close()
        raise
    return connection


def _identify(visitor: socket.socket, key: str) -> int | None:
    """The rank that a visitor shows to be, or None."""
    if _user_of(visitor) != os.geteuid():
        return None
    visitor.settimeout(PATIENCE_S)
    try:
        shown = visitor.recv(_KEY_BYTES + 4)  # in one piece, as it was sent
    except OSError:
        return None
    if len(shown) < _KEY_BYTES + 4 or not secrets.compare_digest(shown[:_KEY_BYTES], bytes.fromhex(key)):
        return None
    return int(struct.unpack("i", shown[_KEY_BYTES:])[0])


def _user_of(connection: socket.socket) -> int:
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)


def _give(visitor: socket.socket, nbytes: int) -> mmap.mmap:
    """New memory, which the visitor is given too. Its size is sealed: to shrink it would kill who maps it."""
    import fcntl  # which Windows lacks

    descriptor = _memory_file()
    try:
        os.fchmod(descriptor, 0o600)
        os.ftruncate(descriptor, nbytes)
        fcntl.fcntl(
            descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        )
        socket.send_fds(visitor, [b"\0"], [descriptor])
        return mmap.mmap(descriptor, nbytes)
    finally:
        os.close(descriptor)


def _memory_file() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("distriray", flags | _MFD_NOEXEC_SEAL)
    except OSError:
        return os.memfd_create("distriray", flags)


def _take(connection: socket.socket, nbytes: int) -> mmap.mmap:
    import fcntl

    _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    if not descriptors:
        raise ConnectionError("a peer left before it handed memory over")
    try:
        if not fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise PermissionError("the memory that a peer handed over is not sealed")
        return mmap.mmap(descriptors[0], nbytes)
    finally:
        os.close(descriptors[0])


def _remaining(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)
