"""A whole gang in one process: ranks that take turns, for measuring pictures rather than speed.

Each rank is a thread, and only the one whose turn it is runs: it hands over where it waits for a message that
has not come. Nothing is computed differently than by processes, and nothing competes for the cores, so
eight ranks cost one core what their arithmetic costs, and as many gangs run at a time as there are cores.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distriray.collective.messages import as_messages
from distriray.collective.subgroup import Subgroup
from distriray.errors import GangBroken


class Gang:
    """What the ranks of one lock-step gang share: whose turn it is, and the messages without a peer."""

    def __init__(self, world_size: int) -> None:
        self.turn = threading.Lock()
        self.arrivals = [threading.Condition(self.turn) for _ in range(world_size)]
        self.broken = False
        # By (source, destination): sends without their receive, or receives without their send; never both.
        self.waiting: dict[tuple[int, int], deque[Message]] = defaultdict(deque)


@dataclass(eq=False)
class Message:
    """One side of a transfer; it is over when the other side has been named too and the bytes are copied."""

    sends: bool
    bytes: torch.Tensor
    work: LockstepWork


class LockstepWork:
    def __init__(self, communicator: LockstepCommunicator) -> None:
        self.pending = 0
        self._communicator = communicator

    def wait(self) -> None:
        gang, rank = self._communicator.gang, self._communicator.rank
        gang.arrivals[rank].wait_for(lambda: gang.broken or not self.pending)
        if self.pending:
            raise GangBroken(f"another rank ended before rank {rank} had its messages")

    def arrived(self) -> None:
        self.pending -= 1
        if not self.pending:
            self._communicator.gang.arrivals[self._communicator.rank].notify()


class LockstepCommunicator:
    """One rank of a lock-step gang. Every call is made by the rank whose turn it is."""

    def __init__(self, gang: Gang, rank: int, device: torch.device) -> None:
        self.gang = gang
        self.rank = rank
        self.world_size = len(gang.arrivals)
        self.device = device
        self.bytes_sent = 0

    @property
    def broken(self) -> bool:
        return self.gang.broken

    def exchange(
        self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]
    ) -> LockstepWork:
        if self.broken:
            raise GangBroken("another rank of this gang has ended")
        work = LockstepWork(self)
        for peer, flat in as_messages(sends, self.rank, self.world_size, self.device):
            self.bytes_sent += flat.nbytes
            self._meet((self.rank, peer), Message(True, flat, work))
        for peer, flat in as_messages(receives, self.rank, self.world_size, self.device):
            self._meet((peer, self.rank), Message(False, flat, work))
        return work

    def _meet(self, path: tuple[int, int], message: Message) -> None:
        """Copy if the other side waits already; wait for it otherwise."""
        waiting = self.gang.waiting[path]
        if not waiting or waiting[0].sends == message.sends:
            message.work.pending += 1
            waiting.append(message)
            return
        other = waiting.popleft()
        source, target = (message, other) if message.sends else (other, message)
        target.bytes.copy_(source.bytes)
        other.work.arrived()

    def subgroup(self, ranks: Sequence[int]) -> Subgroup:
        return Subgroup(self, ranks)

    def abort(self) -> None:
        self.gang.broken = True
        for arrival in self.gang.arrivals:
            arrival.notify()

    def close(self) -> None:
        self.abort()


def run_in_lockstep(
    world_size: int, function: Callable[[LockstepCommunicator], Any], device: torch.device | str = "cpu"
) -> list[Any]:
    """`function(communicator)` of every rank of a gang in this process, in the order of ranks.

    Raises:
        Exception: what the first rank to fail raised; the others are ended with `GangBroken`.
    """
    gang = Gang(world_size)
    results: list[Any] = [None] * world_size
    failures: list[Exception] = []
    threads = torch.get_num_threads()

    def run(rank: int) -> None:
        torch.set_num_threads(threads)  # OpenMP counts them for each thread that calls it
        communicator = LockstepCommunicator(gang, rank, torch.device(device))
        with gang.turn:
            try:
                results[rank] = function(communicator)
            except Exception as error:
                failures.append(error)
                communicator.abort()

    ranks = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(world_size)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    if failures:
        raise failures[0]
    return results
