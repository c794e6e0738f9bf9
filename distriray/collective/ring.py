"""A bounded ring of bytes in memory that two processes share: one writes it, the other reads it.

A message is a record: its length in a cache line of its own, then its bytes. Each end counts the bytes that
it has passed and publishes the count, so nothing is locked. A ring that is full grows, by a record that tells
the reader where it goes on, up to `LARGEST`; what does not fit then waits until the reader has made room.

    0           written, read: what the writer and the reader have passed
    s to 2 s    the ring while its size is s: SMALLEST, twice that, ... LARGEST

Pages that nobody has touched take no memory, and those of a size that was outgrown are given back.
"""

from __future__ import annotations

import contextlib
import mmap
import threading

import numpy as np
import numpy.typing as npt

SMALLEST = 1 << 18
LARGEST = 1 << 26
SPAN = 2 * LARGEST
"""Bytes of address space that a ring takes."""

UNIT = 64
"""Counters and records begin at multiples of it: a cache line."""

PIECE = 1 << 18
"""Bytes that are copied before the other end is told of them."""

_WORD = 8
_WRITTEN, _READ = 0, 2 * UNIT // _WORD  # apart, since processors fetch lines in pairs
_GROWN = 2**64 - 1

Bytes = npt.NDArray[np.uint8]


class Transfer:
    """One message on its way.

    Attributes:
        peer: its other side.
        sends: whether it goes there, or comes from there.
        data: its bytes, or the memory that they are received into.
        done: how many have been copied; -1 before its record has begun.
    """

    __slots__ = ("data", "done", "peer", "sends")

    def __init__(self, peer: int, sends: bool, data: Bytes) -> None:
        self.peer = peer
        self.sends = sends
        self.data = data
        self.done = -1

    @property
    def over(self) -> bool:
        return self.done == len(self.data)


class SizeMismatch(Exception):
    """The message that came has another number of bytes than was expected."""


class _End:
    """One end of a ring at `start` in `memory`, which is fresh: all zero."""

    def __init__(self, memory: mmap.mmap, start: int, mine: int, theirs: int) -> None:
        span = memoryview(memory)[start : start + SPAN]
        self._memory, self._start = memory, start
        self._words = span.cast("Q")
        self._bytes: Bytes = np.frombuffer(span, np.uint8)
        self._mine, self._theirs = mine, theirs
        self._size = SMALLEST
        self._origin = 0  # what had been passed when the ring got its present size
        self._at = 0
        self._seen = 0  # of the other end's count
        self._barrier = threading.Lock()
        self._barrier.acquire()

    @property
    def _place(self) -> int:
        """Position of this end, from `start`."""
        return self._size + (self._at - self._origin) % self._size

    @property
    def _straight(self) -> int:
        """Bytes from there to the end of the ring."""
        return 2 * self._size - self._place

    def _publish(self) -> None:
        self._fence()
        self._words[self._mine] = self._at

    def _look(self) -> None:
        self._seen = self._words[self._theirs]
        self._fence()

    def _resize(self, size: int) -> None:
        self._size, self._origin = size, self._at

    def _fence(self) -> None:
        """All loads and stores before it come before all after it (`docs/decisions/shared-memory.md`)."""
        self._barrier.release()
        self._barrier.acquire()


class Writer(_End):
    """The end that messages go in at."""

    def __init__(self, memory: mmap.mmap, start: int) -> None:
        super().__init__(memory, start, mine=_WRITTEN, theirs=_READ)

    def push(self, transfer: Transfer) -> bool:
        """Copy in what there is room for; whether anything was."""
        begun, data = transfer.done, transfer.data
        if begun < 0:
            self._provide(UNIT + len(data))
            if not self._free:
                return False
            self._record(len(data))
            transfer.done = 0
        while (rest := len(data) - transfer.done) and (room := self._room(rest)):
            nbytes = min(rest, room, PIECE, self._straight)
            place = self._place
            self._bytes[place : place + nbytes] = data[transfer.done : transfer.done + nbytes]
            transfer.done += nbytes
            self._at += -(-nbytes // UNIT) * UNIT
            self._publish()
        return transfer.done > begun

    @property
    def _free(self) -> int:
        """Bytes of room, a multiple of `UNIT`, but for the record that says that the ring has grown."""
        return self._size - UNIT - (self._at - max(self._seen, self._origin))

    def _room(self, wanted: int) -> int:
        if self._free < wanted:
            self._look()
        return self._free

    def _provide(self, wanted: int) -> None:
        """Grow, if a message of so many bytes with its record does not fit and the ring can be larger."""
        if self._room(wanted) >= wanted or self._size == LARGEST:
            return
        size = 2 * self._size
        while size < LARGEST and size - UNIT < wanted:
            size *= 2
        self._record(_GROWN, size)
        self._publish()
        self._resize(size)

    def _record(self, length: int, size: int = 0) -> None:
        word = self._place // _WORD
        self._words[word], self._words[word + 1] = length, size
        self._at += UNIT


class Reader(_End):
    """The end that messages come out at."""

    def __init__(self, memory: mmap.mmap, start: int) -> None:
        super().__init__(memory, start, mine=_READ, theirs=_WRITTEN)

    def pull(self, transfer: Transfer) -> bool:
        """Copy out what has come of a message; whether anything has.

        Raises:
            SizeMismatch: the message has another size than the transfer.
        """
        begun, data = transfer.done, transfer.data
        if begun < 0:
            length = self._next()
            if length is None:
                return False
            if length != len(data):
                peer, expected = transfer.peer, len(data)
                raise SizeMismatch(f"rank {peer} sent {length} bytes where {expected} were expected")
            transfer.done = 0
        while (rest := len(data) - transfer.done) and (come := self._come(rest)):
            nbytes = min(rest, come, PIECE, self._straight)
            place = self._place
            data[transfer.done : transfer.done + nbytes] = self._bytes[place : place + nbytes]
            transfer.done += nbytes
            self._at += -(-nbytes // UNIT) * UNIT
            self._publish()
        return transfer.done > begun

    def _come(self, wanted: int) -> int:
        """Bytes that can be read now."""
        if self._seen - self._at < wanted:
            self._look()
        return self._seen - self._at

    def _next(self) -> int | None:
        """The length of the next message, or None if none has begun."""
        while self._come(UNIT):
            word = self._place // _WORD
            length, size = self._words[word], self._words[word + 1]
            self._at += UNIT
            if length != _GROWN:
                return length
            with contextlib.suppress(OSError):  # then it takes the memory of both sizes
                self._memory.madvise(mmap.MADV_REMOVE, self._start + self._size, self._size)
            self._resize(size)
        return None
