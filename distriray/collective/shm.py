"""Exchange through shared memory between processes of one machine with CPU tensors."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from datetime import timedelta

import torch
from torch.distributed import DistError, Store

from distriray.collective.backend import BackendCommunicator
from distriray.collective.handover import Card, Door, Tie, obstacle_among
from distriray.collective.messages import as_messages
from distriray.collective.rendezvous import Rendezvous
from distriray.collective.ring import SPAN, Reader, SizeMismatch, Transfer, Writer
from distriray.errors import BackendUnavailable, GangBroken

SPINS = 20
"""Looks at the counters before a rank that waits offers its core to others, if each rank has a core."""

YIELD_S = 3e-4
"""Seconds of such offers before it sleeps between looks: each time for `NAP_SHARE` of what it has waited."""

NAP_SHARE = 1 / 32
NAPS_S = (50e-6, 2e-3)
"""The shortest and the longest such sleep."""

LAST_WORD_BYTES = 1000
"""Of why a rank leaves, as much as its peers are told."""

LOOK_EVERY = 64
"""Offers of the core between looks at the peers' connections and the clock; it looks after every sleep."""


class ShmWork:
    """One group of transfers in flight. Holds its tensors until they have been copied."""

    def __init__(self, owner: ShmCommunicator, transfers: list[Transfer]) -> None:
        self._owner = owner
        self._transfers = transfers

    def wait(self) -> None:
        if self._transfers:
            self._owner.finish(self._transfers)
            self._transfers = []


class Link:
    """The way to one peer and back: what is yet to be copied, in order, and where to."""

    def __init__(self, tie: Tie, outward: int) -> None:
        self.connection = tie.connection
        self._writer = Writer(tie.memory, outward * SPAN)
        self._reader = Reader(tie.memory, (1 - outward) * SPAN)
        self.sends: deque[Transfer] = deque()
        self.receives: deque[Transfer] = deque()

    @property
    def last_word(self) -> str:
        """Why the peer left, once the connection has ended; empty if it died."""
        try:
            word = self.connection.recv(LAST_WORD_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError:
            return ""
        return word.decode(errors="replace")

    def leave(self, why: str) -> None:
        """End the connection, in forked children too."""
        with contextlib.suppress(OSError):
            self.connection.send(why.encode()[:LAST_WORD_BYTES], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def push(self) -> bool:
        """Copy in what there is room for; whether anything was."""
        return _moved(self.sends, self._writer.push)

    def pull(self) -> bool:
        """Copy out what has come and is expected; whether anything was. Raises SizeMismatch."""
        return _moved(self.receives, self._reader.pull)


def _moved(transfers: deque[Transfer], move: Callable[[Transfer], bool]) -> bool:
    """Go on with transfers, in order, as far as `move` gets; whether it moved anything."""
    moved = False
    while transfers and move(transfers[0]):
        moved = True
        if not transfers[0].over:
            break
        transfers.popleft()
    return moved


class ShmCommunicator(BackendCommunicator):
    """A gang on one machine, beside any number of others in the same process.

    The sender copies a message into a ring, the receiver copies it out; nobody runs in the background. Each
    call of a rank moves all that it can, for this and for other works. A send that does not fit into the
    ring, which holds 64 MiB, goes on in later calls; so does a peer's when this rank has made room.

    A connection to each peer ends when either process does. A rank that waits looks at it now and then,
    after it has taken what the peer had sent. All that is ever sent on it is why a rank leaves: it ends one
    connection after another, and a peer that hears first may have left before another hears at all.

    Args:
        ties: to every other rank.
        timeout_s: how long each wait may take.
        store: kept until this is closed, since rank 0 may be the one that serves it.
    """

    backend = "shm"

    def __init__(self, ties: Mapping[int, Tie], rank: int, timeout_s: float, store: Store) -> None:
        super().__init__(rank, len(ties) + 1, "cpu")
        self.timeout_s = timeout_s
        self._store: Store | None = store
        self._turn = threading.Lock()
        self._links = {peer: Link(tie, outward=int(rank > peer)) for peer, tie in ties.items()}
        self._descriptors = {tie.connection.fileno(): peer for peer, tie in ties.items()}
        self._connections = select.poll()
        for descriptor in self._descriptors:
            self._connections.register(descriptor, select.POLLIN)
        self._spins = SPINS if self.world_size <= len(os.sched_getaffinity(0)) else 0

    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> ShmWork:
        incoming = as_messages(receives, self.rank, self.world_size, self.device)
        outgoing = as_messages(sends, self.rank, self.world_size, self.device)
        if outgoing:
            lost = self._lost()
            if gone := [peer for peer, _ in outgoing if peer in lost]:
                raise self._left(gone[0], "sending to")
        taken = [Transfer(peer, False, message.numpy()) for peer, message in incoming]
        given = [Transfer(peer, True, message.numpy()) for peer, message in outgoing]
        with self._turn:
            links = self._links  # before the check: the thread that breaks the communicator drops them
            self.check()
            for transfer in taken:
                links[transfer.peer].receives.append(transfer)
            for transfer in given:
                links[transfer.peer].sends.append(transfer)
                self._bytes_sent += len(transfer.data)
        self._move()
        return ShmWork(self, [*taken, *given])

    def finish(self, transfers: list[Transfer]) -> None:
        """Move messages until these have been copied."""
        now = since = time.monotonic()
        deadline = now + self.timeout_s
        idle = 0
        while True:
            moved = self._move()
            pending = [transfer for transfer in transfers if not transfer.over]
            if not pending:
                return
            now = time.monotonic()
            if moved:
                idle, since = 0, now
            idle += 1
            if idle <= self._spins:
                continue
            waited_s = now - since
            if waited_s < YIELD_S:
                os.sched_yield()
            else:
                time.sleep(min(max(NAP_SHARE * waited_s, NAPS_S[0]), NAPS_S[1]))
            if waited_s >= YIELD_S or idle % LOOK_EVERY == 0:
                self._look(pending, deadline)

    def close(self) -> None:
        super().close()
        self._store = None

    def _move(self) -> bool:
        """Copy all that can be, in both directions; whether anything was."""
        moved = False
        with self._turn:
            links = self._links
            self.check()
            try:
                for link in links.values():
                    moved |= link.push()
                for link in links.values():
                    moved |= link.pull()
            except SizeMismatch as error:
                raise self._fail(str(error)) from error
            except BaseException as error:  # an interrupt: what was being copied is neither here nor there
                self._fail(f"rank {self.rank} was interrupted while it copied: {error!r}")
                raise
        return moved

    def _look(self, pending: list[Transfer], deadline: float) -> None:
        """Raise if a transfer waits for a peer that is gone, or has waited too long."""
        lost = self._lost()
        if lost:
            self._move()  # what it had sent before it left
        for transfer in pending:
            if transfer.peer in lost and not transfer.over:
                raise self._left(transfer.peer, _what(transfer))
        if time.monotonic() > deadline:
            late = next((transfer for transfer in pending if not transfer.over), None)
            if late is not None:
                raise self._fail(
                    f"rank {late.peer} did not answer within {self.timeout_s:g} s ({_what(late)} it)"
                )

    def _lost(self) -> Collection[int]:
        """The peers whose connection has ended."""
        with self._turn:  # an object to poll with is for one thread at a time
            ended = self._connections.poll(0)
        if ended:
            self.check()  # another thread may have closed the connections
        return [self._descriptors[descriptor] for descriptor, _ in ended]

    def _left(self, peer: int, what: str) -> GangBroken:
        links = self._links  # before the check, as above
        self.check()
        why = links[peer].last_word
        return self._fail(f"rank {peer} died or left ({what} it)" + (f": {why}" if why else ""))

    def _release(self) -> None:
        links, self._links = self._links, {}
        for link in links.values():
            link.leave(str(self._failure))


def _what(transfer: Transfer) -> str:
    return "sending to" if transfer.sends else "receiving from"


class _Board:
    """The store as a place where every rank posts and all read, until `timeout_s` from now."""

    def __init__(self, store: Store, rank: int, world_size: int, timeout_s: float) -> None:
        self._store, self._rank, self._world_size, self._timeout_s = store, rank, world_size, timeout_s
        self.deadline = time.monotonic() + timeout_s

    def gather(self, what: str, text: str) -> list[str]:
        """The posts of every rank. Raises GangBroken."""
        self._post(what, text)
        keys = [f"{what} {rank}" for rank in range(self._world_size)]
        remaining_s = max(self.deadline - time.monotonic(), 0.001)
        try:
            self._store.wait(keys, timedelta(seconds=remaining_s))
        except DistError as error:
            late = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            raise GangBroken(f"ranks {late} did not answer within {self._timeout_s:g} s") from error
        return [json.loads(self._store.get(key)) for key in keys]

    def any(self, what: str) -> bool:
        """Whether some rank has posted a text that is not empty."""
        keys = [f"{what} {rank}" for rank in range(self._world_size)]
        return any(self._store.check([key]) and json.loads(self._store.get(key)) for key in keys)

    def part(self) -> None:
        """Let rank 0, with which the store may end, be the last to leave."""
        with contextlib.suppress(GangBroken, DistError):
            if self._rank:
                self._post("parting", "")
            else:
                self.gather("parting", "")

    def _post(self, what: str, text: str) -> None:
        self._store.set(f"{what} {self._rank}", json.dumps(text))


def join(rendezvous: Rendezvous) -> ShmCommunicator:
    """Hand memory round.

    Raises:
        BackendUnavailable: on all ranks alike, because they are not on one machine, or it does not allow it.
    """
    return rendezvous.meet("shm", lambda store, _: _meet(rendezvous, store))


def _meet(rendezvous: Rendezvous, store: Store) -> ShmCommunicator:
    rank, world_size = rendezvous.rank, rendezvous.world_size
    board = _Board(store, rank, world_size, rendezvous.timeout_s)
    with Door(world_size) as door, ExitStack() as undo:
        cards = [Card.parse(text) for text in board.gather("card", door.card.text)]
        obstacle = obstacle_among(cards)
        if not obstacle:
            ties, failure = _tied(door, rank, cards, board)
            for tie in ties.values():
                undo.callback(tie.connection.close)
            obstacle = "; ".join(filter(None, board.gather("failure", failure)))
        if obstacle:
            board.part()
            raise BackendUnavailable(f"gang {rendezvous.name!r} cannot share memory: {obstacle}")
        communicator = ShmCommunicator(ties, rank, rendezvous.timeout_s, store)
        communicator.greet()
        undo.pop_all()
    return communicator


def _tied(door: Door, rank: int, cards: list[Card], board: _Board) -> tuple[dict[int, Tie], str]:
    """This rank's ties, or what kept it from them."""
    try:
        return door.ties(rank, cards, 2 * SPAN, board.deadline, lambda: board.any("failure")), ""
    except TimeoutError as error:
        raise GangBroken(f"rank {rank} could not share memory with its gang: {error}") from error
    except OSError as error:
        return {}, f"rank {rank} could not share memory with its peers ({error})"
