"""A whole gang in one process: ranks that take turns, on one device.

Each rank is a thread, and only the one whose turn it is runs: it hands over where it waits for a message that
has not come. The results are those of separate processes, bit for bit, and nothing competes for the cores, so
eight ranks cost one core what their arithmetic costs. It is for tests and for measuring pictures; ranks gain
no speed by it.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distriray.collective.messages import Messages, as_messages, indexed, peers_of
from distriray.collective.subgroup import Subgroup
from distriray.errors import GangBroken


class Gang:
    """State shared by the ranks of a lock-step gang: the turn, and messages whose other side is missing.

    Attributes:
        waiting: by (source, destination), sends without their receive, or receives without their send; never
            both.
        awaited: by rank, the work that it waits for.
        ended: how many ranks have ended.
        failure: why the gang broke, or None.
    """

    def __init__(self, world_size: int) -> None:
        self.turn = threading.Lock()
        self.arrivals = [threading.Condition(self.turn) for _ in range(world_size)]
        self.waiting: dict[tuple[int, int], deque[Transfer]] = defaultdict(deque)
        self.awaited: dict[int, LockstepWork] = {}
        self.ended = 0
        self.failure: str | None = None

    def fail(self, cause: str) -> None:
        """Break the gang, unless it is broken, and wake every rank."""
        self.failure = self.failure or cause
        for arrival in self.arrivals:
            arrival.notify()

    def check_progress(self) -> None:
        """Break the gang if nobody is left to take a turn, since what ranks wait for can then never come."""
        if self.awaited and len(self.awaited) + self.ended == len(self.arrivals):
            self.fail(f"ranks {sorted(self.awaited)} wait for messages that no rank sends")


@dataclass(eq=False)
class Transfer:
    """One side of a transfer, which is over once the other side is named too and the bytes are copied."""

    sends: bool
    bytes: torch.Tensor
    work: LockstepWork


class LockstepWork:
    """The transfers of one exchange."""

    def __init__(self, communicator: LockstepCommunicator) -> None:
        self.pending = 0
        self._communicator = communicator

    def wait(self) -> None:
        gang, rank = self._communicator.gang, self._communicator.rank
        if self.pending and gang.failure is None:
            gang.awaited[rank] = self
            gang.check_progress()
            gang.arrivals[rank].wait_for(lambda: gang.failure is not None or not self.pending)
            gang.awaited.pop(rank, None)
        if self.pending:
            raise GangBroken(f"rank {rank} did not get its messages: {gang.failure}")

    def arrived(self) -> None:
        self.pending -= 1
        gang, rank = self._communicator.gang, self._communicator.rank
        if not self.pending and gang.awaited.get(rank) is self:
            del gang.awaited[rank]
            gang.arrivals[rank].notify()


class LockstepCommunicator:
    """One rank of a lock-step gang. Only the rank whose turn it is makes calls."""

    backend = "lock-step"

    def __init__(self, gang: Gang, rank: int, device: torch.device) -> None:
        self.gang = gang
        self.rank = rank
        self.world_size = len(gang.arrivals)
        self.peers = peers_of(rank, self.world_size)
        self.device = device
        self.bytes_sent = 0

    @property
    def broken(self) -> bool:
        return self.gang.failure is not None

    def check(self) -> None:
        if self.gang.failure is not None:
            raise GangBroken(self.gang.failure)

    def exchange(
        self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]
    ) -> LockstepWork:
        self.check()
        work = LockstepWork(self)
        for peer, flat in as_messages(sends, self.rank, self.world_size, self.device):
            self.bytes_sent += flat.nbytes
            self._meet((self.rank, peer), Transfer(True, flat, work))
        for peer, flat in as_messages(receives, self.rank, self.world_size, self.device):
            self._meet((peer, self.rank), Transfer(False, flat, work))
        return work

    def _meet(self, path: tuple[int, int], transfer: Transfer) -> None:
        """Copy if the other side waits already; wait for it otherwise."""
        waiting = self.gang.waiting[path]
        if not waiting or waiting[0].sends == transfer.sends:
            transfer.work.pending += 1
            waiting.append(transfer)
            return
        other = waiting.popleft()
        source, target = (transfer, other) if transfer.sends else (other, transfer)
        sent, expected = source.bytes.nbytes, target.bytes.nbytes
        if sent != expected:
            self.gang.fail(f"rank {path[0]} sent {sent} bytes where {expected} were expected")
            self.check()
        target.bytes.copy_(source.bytes)
        other.work.arrived()

    def messages(self, tensors: Mapping[int, torch.Tensor]) -> Messages:
        return Messages(as_messages(tensors, self.rank, self.world_size, self.device), tensors)

    def subgroup(self, ranks: Sequence[int]) -> Subgroup:
        return Subgroup(self, ranks)

    def abort(self) -> None:
        self.gang.fail(f"rank {self.rank} aborted the gang")

    def close(self) -> None:
        self.gang.fail(f"rank {self.rank} closed its communicator")


def run_in_lockstep(
    world_size: int, function: Callable[[LockstepCommunicator], Any], device: torch.device | str = "cpu"
) -> list[Any]:
    """Run `function(communicator)` as every rank of a gang in this process, one at a time.

    Args:
        world_size: number of ranks.
        function: any callable; it is called from `world_size` threads, of which one runs at a time.
        device: of the tensors, one for all ranks.

    Returns:
        What each rank returned, in the order of ranks; their communicators are closed.

    Raises:
        BaseException: what the first rank to fail raised. The others end with `GangBroken`, and so do ranks
            that wait for messages which no rank sends.
        ValueError: `world_size` is less than 1.
    """
    if world_size < 1:
        raise ValueError(f"a gang has at least one rank, not {world_size}")
    gang, place = Gang(world_size), indexed(device)
    results: list[Any] = [None] * world_size
    failures: list[BaseException] = []
    threads = torch.get_num_threads()

    def run(rank: int) -> None:
        torch.set_num_threads(threads)  # OpenMP counts them for each thread that calls it
        communicator = LockstepCommunicator(gang, rank, place)
        with gang.turn:
            try:
                results[rank] = function(communicator)
            except BaseException as error:  # a test's `pytest.fail` is no Exception
                failures.append(error)
                gang.fail(f"rank {rank} failed with {type(error).__name__}: {error}")
            gang.ended += 1
            gang.check_progress()

    ranks = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(world_size)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    with gang.turn:
        gang.fail("the gang is over: its ranks have returned")  # who keeps buffers for it lets go of them
    if failures:
        raise failures[0]
    return results
