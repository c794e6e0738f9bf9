"""Exchange over TCP between processes with CPU tensors."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch.distributed import ProcessGroupGloo, Store

from distriray.collective.backend import BackendCommunicator
from distriray.collective.messages import as_messages
from distriray.collective.rendezvous import Rendezvous
from distriray.errors import GangBroken


class Transfer(NamedTuple):
    peer: int
    what: str
    work: torch.distributed.Work


class GlooWork:
    """One group of transfers in flight. Holds its tensors until they have arrived."""

    def __init__(self, owner: GlooCommunicator, transfers: list[Transfer]) -> None:
        self._owner = owner
        self._transfers = transfers

    def wait(self) -> None:
        deadline = time.monotonic() + self._owner.timeout_s
        for transfer in self._transfers:
            self._owner.finish(transfer, deadline)
        self._transfers.clear()


class GlooCommunicator(BackendCommunicator):
    """A gang over gloo's TCP transport, beside any number of others in the same process.

    It uses `ProcessGroupGloo` directly, so there is no global process group, and point-to-point transfers
    only, which gloo runs in one thread of its own per communicator (a second one, for collectives, idles).
    A wait blocks on a condition variable: it costs neither CPU nor latency.

    The constructor returns once all ranks are connected with each other; after that the store is not used.

    Args:
        store: where the ranks find each other; it must be fresh (a `PrefixStore` with a name of its own).
        host: address of this rank's network interface, which its peers can reach.
        timeout_s: how long connecting, and later each wait, may take.

    Raises:
        GangBroken: not all ranks arrived within `timeout_s`.
    """

    backend = "gloo"

    def __init__(self, store: Store, rank: int, world_size: int, host: str, timeout_s: float) -> None:
        super().__init__(rank, world_size, "cpu")
        self.timeout_s = timeout_s
        self._sent = [0] * world_size
        self._received = [0] * world_size
        self._store: Store | None = store  # rank 0 may be the one that serves it: to be kept until closed
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = 1
        options._devices = [_device(host)]
        try:
            self._group: Any = ProcessGroupGloo(store, rank, world_size, options)
        except RuntimeError as error:
            raise GangBroken(f"rank {rank} could not connect to its gang of {world_size}: {error}") from error
        self.greet()

    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> GlooWork:
        incoming = as_messages(receives, self.rank, self.world_size, self.device)
        outgoing = as_messages(sends, self.rank, self.world_size, self.device)
        group = self._group  # before the check: the thread that breaks the communicator drops it
        self.check()
        transfers: list[Transfer] = []
        peer = self.rank
        try:
            for peer, message in incoming:
                tag = _tag(self._received[peer], message.numel())
                transfers.append(Transfer(peer, "receiving from", group.recv([message], peer, tag)))
                self._received[peer] += 1
            for peer, message in outgoing:
                tag = _tag(self._sent[peer], message.numel())
                transfers.append(Transfer(peer, "sending to", group.send([message], peer, tag)))
                self._sent[peer] += 1
                self._bytes_sent += message.numel()
        except RuntimeError as error:
            raise self._fail(f"rank {peer} died or left ({_reason(error)})") from error
        return GlooWork(self, transfers)

    def finish(self, transfer: Transfer, deadline: float) -> None:
        """Wait for one transfer of a group until `deadline` on the monotonic clock."""
        self.check()
        remaining_s = max(deadline - time.monotonic(), 0.001)
        try:
            transfer.work.wait(timedelta(seconds=remaining_s))
        except RuntimeError as error:
            if time.monotonic() > deadline - 0.01:  # gloo counts in whole milliseconds
                cause = (
                    f"rank {transfer.peer} did not answer within {self.timeout_s:g} s ({transfer.what} it)"
                )
            else:
                cause = f"rank {transfer.peer} died or left ({transfer.what} it: {_reason(error)})"
            raise self._fail(cause) from error

    def close(self) -> None:
        super().close()
        self._store = None

    def _release(self) -> None:
        group, self._group = self._group, None
        _cut(group)


def join(rendezvous: Rendezvous) -> GlooCommunicator:
    """Connect all ranks with each other over the network interface that leads to the store."""
    rank, world_size, timeout_s = rendezvous.rank, rendezvous.world_size, rendezvous.timeout_s
    return rendezvous.meet(
        "gloo", lambda store, interface: GlooCommunicator(store, rank, world_size, interface, timeout_s)
    )


def _tag(count: int, nbytes: int) -> int:
    """The 31-bit tag of a pair's `count`-th message.

    It holds the size too: a peer that expects another size then times out; gloo alone, given a message longer
    than its buffer, would abort the process.
    """
    return (count & 0x3FFF) << 17 | nbytes % 0x1FFFF


def _reason(error: RuntimeError) -> str:
    """Gloo's message without its source location and the advice that follows."""
    return str(error).split("] ", 1)[-1].split(". ")[0]


def _cut(group: Any) -> None:
    """Close all connections of a group and wake the threads that wait for them.

    `ProcessGroupGloo.abort` and `shutdown` do neither (torch 2.13). A transfer that times out does both: gloo
    then closes every pair of its context. So start one that nobody answers.
    """
    never = torch.empty(1, dtype=torch.uint8)
    for peer in range(group.size()):
        if peer != group.rank():
            with contextlib.suppress(RuntimeError):
                group.recv([never], peer, 0x7FFFFFFF).wait(timedelta(milliseconds=1))


def _device(host: str) -> ProcessGroupGloo.Device:
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if not interface:
        return ProcessGroupGloo.create_device(hostname=host)
    try:
        return ProcessGroupGloo.create_device(interface=interface)
    except RuntimeError as error:
        raise ValueError(f"GLOO_SOCKET_IFNAME names {interface!r}, which has no address here") from error
