"""Immediate notice of the death of a peer's process, for transports that give none."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import torch

from distriray.collective.gloo import GlooCommunicator
from distriray.errors import GangBroken

FOREVER_S = 3e8


class Lifeline:
    """TCP connections between all ranks on which nothing is sent but a farewell.

    A thread waits for the farewells, that of the next rank first. The kernel closes the connections of a
    process that dies, so the rank before it wakes, and cuts its own, which wakes the one before: the whole
    gang knows within milliseconds.

    Args:
        communicator: a gloo communicator of the same ranks, for no other use.
        on_loss: called once, from another thread, with what happened to whom.
    """

    def __init__(self, communicator: GlooCommunicator, on_loss: Callable[[str], object]) -> None:
        communicator.timeout_s = FOREVER_S
        self._communicator = communicator
        self._on_loss = on_loss
        self._lock = threading.Lock()
        self._cut = False
        rank, world_size = communicator.rank, communicator.world_size
        self._peers = [(rank + step) % world_size for step in range(1, world_size)]
        self._farewells = communicator.exchange({}, {peer: torch.empty(1) for peer in self._peers})
        self._thread = threading.Thread(target=self._watch, name="distriray-lifeline", daemon=True)

    def watch(self) -> None:
        """Begin to wait."""
        self._thread.start()

    def part(self, patience_s: float) -> None:
        """Say farewell and wait until all peers have, for at most `patience_s`; then cut the connections."""
        if not self._cut and not self._communicator.broken:
            with contextlib.suppress(GangBroken):
                self._parting = self._communicator.exchange(dict.fromkeys(self._peers, torch.ones(1)), {})
                self._thread.join(patience_s)
        self.cut()

    def cut(self) -> None:
        """Report to the peers that this rank gave up."""
        with self._lock:
            self._cut = True
        self._communicator.close()

    def _watch(self) -> None:
        try:
            self._farewells.wait()
        except GangBroken as error:
            with self._lock:
                expected = self._cut
            if not expected:
                self._on_loss(str(error))
