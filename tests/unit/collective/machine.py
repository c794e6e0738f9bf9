"""A machine whose devices are none, with gangs over NCCL on it, all in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, PrefixStore

from distriray.collective.gloo import GlooCommunicator
from distriray.collective.nccl import NcclCommunicator

from .fake_cuda import FakeCuda
from .fake_nccl import FakeNccl


class Machine:
    """Fake devices, and the gangs of ranks on them: rank i of a gang is on device i."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **cuda: Any) -> None:
        self.cuda = FakeCuda(**cuda)
        self.cuda.install(monkeypatch)
        self.nccl = FakeNccl(self.cuda)
        self.nccl.install(monkeypatch)
        self.controls: dict[tuple[str, int], GlooCommunicator] = {}
        self.gates: list[threading.Event] = []
        self._store, self._names = HashStore(), count()
        self._joined: list[NcclCommunicator] = []

    def name(self) -> str:
        return f"gang-{next(self._names)}"

    def join(self, name: str, rank: int, world_size: int = 2, timeout_s: float = 10.0) -> NcclCommunicator:
        """In the thread of a rank."""
        store = PrefixStore(name, self._store)
        control = GlooCommunicator(store, rank, world_size, "127.0.0.1", timeout_s)
        self.controls[name, rank] = control
        communicator = NcclCommunicator(control, torch.device("cpu", rank), timeout_s)
        self._joined.append(communicator)
        return communicator

    def each(self, function: Callable[..., Any], *per_rank: Any, ranks: int = 2) -> list[Any]:
        """What `function(rank, ...)` returns, called by a thread for each rank."""
        with ThreadPoolExecutor(ranks) as threads:
            works = [
                threads.submit(self.on, rank, function, rank, *(values[rank] for values in per_rank))
                for rank in range(ranks)
            ]
            return [work.result(30) for work in works]

    def on(self, rank: int, function: Callable[..., Any], *args: Any) -> Any:
        """Call it as a thread of that rank's device would."""
        with torch.cuda.device(torch.device("cpu", rank)):
            return function(*args)

    def gang(self, world_size: int = 2, **changes: Any) -> list[NcclCommunicator]:
        name = self.name()
        return self.each(lambda rank: self.join(name, rank, world_size, **changes), ranks=world_size)

    def block(self) -> threading.Event:
        """Keep the current stream busy until the event that this returns is set."""
        gate = threading.Event()
        self.gates.append(gate)
        self.cuda.compute(lambda: gate.wait(5))
        return gate

    def close(self) -> None:
        for gate in self.gates:
            gate.set()
        for communicator in self._joined:
            self.on(communicator.rank, communicator.abort)
        for communicator in self._joined:
            communicator.close()
        self.cuda.close()
        assert not self.cuda.errors
