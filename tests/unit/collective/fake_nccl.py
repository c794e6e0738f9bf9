"""CuPy's NCCL between the devices of `FakeCuda`."""

from __future__ import annotations

import ctypes
import secrets
import sys
import threading
from collections import defaultdict, deque
from types import ModuleType
from typing import Any

import pytest
import torch

from distriray.collective import nccl
from distriray.collective.messages import as_messages

from .fake_cuda import FakeCuda


class FakeNccl(ModuleType):
    """`cupy.cuda.nccl`. A group is a kernel that ends once every part of it has met its other side.

    Attributes:
        groups: how many kernels each device was given.
    """

    NCCL_UINT8 = 1
    available = True

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__("cupy.cuda.nccl")
        self.cuda = cuda
        self.groups: defaultdict[torch.device, int] = defaultdict(int)
        self.wires: defaultdict[tuple[bytes, int, int], deque[list[int]]] = defaultdict(deque)
        self.arrived: defaultdict[bytes, set[int]] = defaultdict(set)
        self._thread = threading.local()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take the place of CuPy until the test is over."""
        cupy, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
        cupy.__version__, cuda.nccl = "14.0.0", self  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
        monkeypatch.setattr(nccl, "_idle_streams", defaultdict(list))
        # Tensors of the CPU never say which.
        monkeypatch.setattr(nccl, "as_messages", lambda *args: as_messages(*args[:3], torch.device("cpu")))

    def NcclCommunicator(self, world_size: int, identity: bytes, rank: int) -> FakeNcclCommunicator:
        with self.cuda.moved:
            self.arrived[identity].add(rank)
            self.cuda.moved.notify_all()
        self.cuda.until(lambda: len(self.arrived[identity]) == world_size)
        return FakeNcclCommunicator(self, identity, rank)

    def get_unique_id(self) -> bytes:
        return secrets.token_bytes(128)

    def get_version(self) -> int:
        return 22809

    def groupStart(self) -> None:
        self._thread.parts = []

    def groupEnd(self) -> None:
        if parts := self._thread.parts:
            owner, stream = parts[0][0], self.cuda.streams[parts[0][-1]]
            owner.given += 1
            self.groups[self.cuda.place()] += 1
            stream.launch(lambda: owner.kernel(parts))

    def add(self, *part: Any) -> None:
        self._thread.parts.append(part)


class FakeNcclCommunicator:
    def __init__(self, nccl: FakeNccl, identity: bytes, rank: int) -> None:
        self._nccl, self._cuda, self._identity, self._rank = nccl, nccl.cuda, identity, rank
        self._cuda.place()
        self._aborted = False
        self.given = self.done = 0

    def send(self, pointer: int, nbytes: int, kind: int, peer: int, stream: int) -> None:
        self.check_async_error()
        self._nccl.add(
            self, True, [pointer, nbytes], self._nccl.wires[self._identity, self._rank, peer], stream
        )

    def recv(self, pointer: int, nbytes: int, kind: int, peer: int, stream: int) -> None:
        self.check_async_error()
        self._nccl.add(
            self, False, [pointer, nbytes], self._nccl.wires[self._identity, peer, self._rank], stream
        )

    def kernel(self, parts: list[Any]) -> None:
        """Offer what is sent on its wire and take what is received from one: copied when both are there."""
        sends = [(part, wire) for _, is_send, part, wire, _ in parts if is_send]
        receives = [(part, wire) for _, is_send, part, wire, _ in parts if not is_send]

        def progress() -> bool:
            for receive in list(receives):
                (pointer, nbytes), wire = receive
                if wire and not self._aborted:
                    offer = wire.popleft()
                    if offer[1] != nbytes:
                        self._cuda.errors.append(ValueError(f"{offer[1]} bytes sent, {nbytes} received"))
                    ctypes.memmove(pointer, offer[0], min(offer[1], nbytes))
                    receives.remove(receive)
                    self._cuda.moved.notify_all()
            sent = all(all(offer is not part for offer in wire) for part, wire in sends)
            return self._aborted or (not receives and sent)

        with self._cuda.moved:
            for part, wire in sends:
                wire.append(part)
            self._cuda.moved.notify_all()
            self._cuda.until(progress)
            for part, wire in sends:  # what an abort leaves
                for place in [place for place, offer in enumerate(wire) if offer is part]:
                    del wire[place]
            self.done += 1
            self._cuda.moved.notify_all()

    def abort(self) -> None:
        """End all kernels, and wait for those that their stream has not reached; then free memory, for which
        CUDA waits until the device has done all that it was given.
        """
        device = self._cuda.place()
        with self._cuda.moved:
            self._aborted = True
            self._cuda.moved.notify_all()
        self._cuda.until(lambda: self.done == self.given)
        given = [(stream, stream.given) for stream in self._cuda.streams if stream.device == device]
        self._cuda.until(lambda: all(stream.done >= target for stream, target in given))

    def check_async_error(self) -> None:
        if self._aborted:
            raise KeyError(7)  # as CuPy does with a code that it does not know
