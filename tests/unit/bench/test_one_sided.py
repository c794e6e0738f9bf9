"""Ends that write into each other's memory, with a driver and symmetric memory that are stand-ins."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from bench.gpu.one_sided import (
    GATES,
    ONE,
    SIZES,
    TWO,
    WAYS,
    Ends,
    HostFlags,
    Mapped,
    Pair,
    Place,
    StreamFlags,
    by_cuda_ipc,
    by_symmetric_memory,
    in_one_process,
    measure,
)
from distriray.collective import serve_store

CPU = torch.device("cpu")


class Driver:
    """CUDA's driver on the host: addresses are the host's, and a stream runs at once."""

    def __init__(self, code: int = 0) -> None:
        self.code = code

    def cuStreamWriteValue32_v2(self, stream: Any, address: Any, value: Any, flags: Any) -> int:
        assert (stream.value, flags.value) == (7, 0)
        ctypes.c_uint32.from_address(address.value).value = value.value
        return self.code

    def cuStreamWaitValue32_v2(self, stream: Any, address: Any, value: Any, flags: Any) -> int:
        assert (stream.value, flags.value) == (7, 0)
        assert ctypes.c_uint32.from_address(address.value).value >= value.value, "it would wait for ever"
        return self.code


@dataclass
class Symmetric:
    """torch's symmetric memory on the host, for all ranks of one process."""

    world_size: int
    memory: dict[int, torch.Tensor] = field(default_factory=dict)
    signals: dict[tuple[int, int, int], bool] = field(default_factory=dict)
    rank: int = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        for rank in range(self.world_size):
            self.memory.setdefault(rank, torch.empty(shape, dtype=dtype, device=device))
        return self.memory[self.rank]

    def rendezvous(self, own: torch.Tensor, group: object) -> Any:
        assert own is self.memory[self.rank]
        rank, signals = self.rank, self.signals

        def put(to: int, channel: int) -> None:
            assert not signals.get((to, rank, channel)), "the last one is not taken yet"
            signals[to, rank, channel] = True

        def wait(source: int, channel: int) -> None:
            assert signals.pop((rank, source, channel)), "it would wait for ever"

        return SimpleNamespace(
            get_buffer=lambda rank, shape, dtype: self.memory[rank], put_signal=put, wait_signal=wait
        )


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    stand_in = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: stand_in)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    return stand_in


def place(rank: int = 0, world_size: int = ONE, store: HashStore | None = None) -> Place:
    return Place(rank, world_size, store or HashStore(), "", CPU)


def checked(ends: Ends) -> None:
    Pair(ends, place()).check()


@pytest.mark.parametrize("notice", [StreamFlags, HostFlags])
def test_ends_of_one_process_exchange_what_they_send(
    notice: Callable[[torch.Tensor, torch.Tensor], Any], driver: Driver
) -> None:
    checked(in_one_process(notice, place()))


@pytest.mark.parametrize("processes", [ONE, TWO])
@pytest.mark.parametrize("signals", [True, False])
def test_ends_of_symmetric_memory_exchange_what_they_send(
    processes: int, signals: bool, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    symmetric = Symmetric(processes)
    monkeypatch.setattr(torch.distributed, "_symmetric_memory", symmetric, raising=False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "group", SimpleNamespace(WORLD=object()))
    ends: dict[int, Any] = {}
    for symmetric.rank in range(processes):
        ends.update(by_symmetric_memory(signals, place(symmetric.rank, processes)))
    checked(ends)


def test_ends_of_two_processes_open_each_others_memory(driver: Driver) -> None:
    store = HashStore()
    with ThreadPoolExecutor(2) as threads:
        ends = threads.map(by_cuda_ipc, (place(rank, TWO, store) for rank in range(2)))
        checked({rank: end for opened in ends for rank, end in opened.items()})


@pytest.mark.parametrize("lost", ["a message", "a slot"])
def test_bytes_that_were_not_sent_are_told(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Losing(Mapped):
        def begin(self, data: torch.Tensor) -> None:
            if lost == "a message" and self._count == 3:
                data = torch.zeros_like(data)
            super().begin(data)
            if lost == "a slot":
                self._theirs = self._theirs[:1].expand(2, -1)

    monkeypatch.setattr("bench.gpu.one_sided.Mapped", Losing)
    with pytest.raises(RuntimeError, match=r"\d+ bytes are not those that were sent"):
        checked(in_one_process(HostFlags, place()))


def test_a_flag_that_the_driver_refuses_is_told(driver: Driver) -> None:
    ends = in_one_process(StreamFlags, place())
    driver.code = 801
    with pytest.raises(RuntimeError, match="refused a flag with error 801"):
        ends[0].begin(torch.zeros(8, dtype=torch.uint8))


def test_each_message_is_timed() -> None:
    served = serve_store("127.0.0.1")
    assert (ONE, "flags") in WAYS["cpu"]
    taken = measure(0, ONE, served.address, "cpu", "flags", 2, 3)
    assert taken.keys() == SIZES.keys()
    assert all(device_us > 0 and host_us > 0 for device_us, host_us in taken.values())


@pytest.mark.parametrize("late", [0, 2, GATES])
def test_a_gate_that_opens_before_all_is_given_is_made_longer(
    late: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            assert gates

        def query(self) -> bool:
            return len(gates) <= late

        def elapsed_time(self, other: Event) -> float:
            return 30.0

    pair = Pair(in_one_process(HostFlags, place()), place())
    monkeypatch.setattr(pair, "_device", torch.device("cuda"))
    monkeypatch.setattr(pair, "_gated", True)
    monkeypatch.setattr(pair, "_streams", {0: "first", 1: "second"})
    monkeypatch.setattr("bench.gpu.one_sided.finish", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", gates.append)
    if late == GATES:
        with pytest.raises(RuntimeError, match=r"the host takes more than 0\.4 s for 3 exchanges"):
            pair.time(8, 3)
    else:
        device_s, host_s = pair.time(8, 3)
        assert device_s == pytest.approx(0.01) and host_s > 0
    assert gates == [gates[0] * 2**number for number in range(min(late + 1, GATES))]
