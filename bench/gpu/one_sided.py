"""A wait and a halo by memory that peers map, beside NCCL's: `python -m bench.gpu.one_sided`.

Two ends exchange messages, both ways at once: one copies into memory that the other has mapped too, and tells
it; the other's stream waits for that. No host takes part. `flags` tells by writing a number and waits for it,
operations of the stream that take no multiprocessor; `signals` does both by kernels of torch's symmetric
memory. NCCL sends and receives.

One GPU is enough. There the ends are two streams of one process, for what an exchange takes of the device;
NCCL, which has no second rank then, sends one message to itself, which is the least that it takes. `nothing`
is what the host takes for going from stream to stream, and is in all its times. And the ends are two
processes, for whether it works: these share the GPU by turns of milliseconds, so that their times say how the
ways compare there and nothing else. With two GPUs each process has its own. A way that fails does not keep
others from being tried.

`--device cpu` is a dry run: flags in the host's memory, and the backends that there are.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing.reduction import ForkingPickler
from statistics import median
from typing import Any, Protocol

import torch
import torch.distributed
import torch.multiprocessing  # teaches pickle to hand memory of a GPU to another process
from torch.distributed import Store

from bench.arguments import add_json
from bench.barrier import finish
from bench.gpu.sharing import has_switch, sharing_environment
from bench.report import Report
from distriray.arguments import positive
from distriray.collective import Communicator, connect, serve_store
from distriray.collective.nccl import load_nccl
from distriray.collective.processes import RankProcesses
from distriray.collective.store import open_store

SIZES = {"1 KiB": 1 << 10, "1 MiB": 1 << 20}
SLOTS = 2
"""An end is two messages ahead at most: it has the other's answer to the last but one by then."""
FLAG = 128  # bytes kept for a flag, behind the slots
LIMIT_S, WAIT_S = 75.0, 30.0  # for a way, with the start of its processes; for one exchange of a backend
GATE_S, GATES = 0.05, 4
CLOCK_HZ = 2e9  # no GPU's is faster, so that a gate is closed at least as long as it is to be
COLUMNS = ("ends", "way", "message", "an exchange, us", "host for an end, us")


class End(Protocol):
    """One end of a pair. What it calls is given to the current stream.

    Attributes:
        peer: the end that its messages come from.
    """

    peer: int

    def begin(self, data: torch.Tensor) -> None:
        """Send `data`, flat uint8. It may be changed once the stream is behind `end`."""

    def end(self) -> torch.Tensor:
        """The peer's message, as large, for the stream that waits for it; valid until the next `begin`."""


class Idle:
    """An end that does nothing."""

    def __init__(self, peer: int) -> None:
        self.peer = peer

    def begin(self, data: torch.Tensor) -> None:
        self._data = data

    def end(self) -> torch.Tensor:
        return self._data


class Notice(Protocol):
    """A way to tell the other end that a message lies in its memory."""

    def tell(self, number: int) -> None:
        """Say, behind what the stream has copied, that message `number`, from 1, is there."""

    def wait(self, number: int) -> None:
        """Keep the stream until the peer has said so."""


class Mapped:
    """An end that writes into the other's memory.

    Args:
        mine: flat uint8 that the peer has mapped, of which `SLOTS` messages come first.
        theirs: the peer's.
    """

    def __init__(self, peer: int, mine: torch.Tensor, theirs: torch.Tensor, notice: Notice) -> None:
        self.peer = peer
        self._mine, self._theirs = (memory[:-FLAG].view(SLOTS, -1) for memory in (mine, theirs))
        self._notice = notice
        self._count = self._bytes = 0

    def begin(self, data: torch.Tensor) -> None:
        self._bytes = data.numel()
        self._theirs[self._count % SLOTS, : self._bytes].copy_(data)
        self._notice.tell(self._count + 1)

    def end(self) -> torch.Tensor:
        message = self._mine[self._count % SLOTS, : self._bytes]
        self._count += 1
        self._notice.wait(self._count)
        return message


class StreamFlags:
    """Numbers in both ends' memory, which streams write and wait for (CUDA's stream memory operations)."""

    def __init__(self, mine: torch.Tensor, theirs: torch.Tensor) -> None:
        self._mine, self._theirs = (memory[-FLAG:].data_ptr() for memory in (mine, theirs))
        self._driver = ctypes.CDLL("libcuda.so.1")

    def tell(self, number: int) -> None:
        self._call(self._driver.cuStreamWriteValue32_v2, self._theirs, number)

    def wait(self, number: int) -> None:
        self._call(self._driver.cuStreamWaitValue32_v2, self._mine, number)  # flags 0: until it is reached

    @staticmethod
    def _call(function: Any, address: int, number: int) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        code = function(
            ctypes.c_void_p(stream), ctypes.c_uint64(address), ctypes.c_uint32(number), ctypes.c_uint(0)
        )
        if code:
            raise RuntimeError(f"CUDA's driver refused a flag with error {code}")


class HostFlags:
    """Numbers in memory of this process, in place of those of a GPU."""

    def __init__(self, mine: torch.Tensor, theirs: torch.Tensor) -> None:
        self._mine, self._theirs = (memory[-FLAG:][:4].view(torch.int32) for memory in (mine, theirs))

    def tell(self, number: int) -> None:
        self._theirs.fill_(number)

    def wait(self, number: int) -> None:
        if int(self._mine) < number:
            raise RuntimeError("a stream would wait for a message that nobody has sent")


class Signals:
    """Signals of torch's symmetric memory, one at a time on each end's own channel."""

    def __init__(self, handle: Any, rank: int, end: int, peer: int) -> None:
        self._handle, self._rank, self._end, self._peer = handle, rank, end, peer

    def tell(self, number: int) -> None:
        self._handle.put_signal(self._rank, channel=self._end)

    def wait(self, number: int) -> None:
        self._handle.wait_signal(self._rank, channel=self._peer)


class Messages:
    """An end of a communicator."""

    def __init__(self, communicator: Communicator, largest: int) -> None:
        self.peer = 1 - communicator.rank
        self._communicator = communicator
        self._room = torch.empty(largest, dtype=torch.uint8, device=communicator.device)

    def begin(self, data: torch.Tensor) -> None:
        self._received = self._room[: data.numel()]
        self._work = self._communicator.exchange({self.peer: data}, {self.peer: self._received})

    def end(self) -> torch.Tensor:
        self._work.wait()
        return self._received


class ToItself:
    """NCCL with one rank, on a stream of its own as `NcclCommunicator` has it."""

    peer = 0

    def __init__(self, largest: int, device: torch.device) -> None:
        self._nccl = load_nccl()
        self._communicator = self._nccl.NcclCommunicator(1, self._nccl.get_unique_id(), 0)
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._room = torch.empty(largest, dtype=torch.uint8, device=device)

    def begin(self, data: torch.Tensor) -> None:
        self._received = self._room[: data.numel()]
        self._stream.wait_stream(torch.cuda.current_stream())
        common = (data.numel(), self._nccl.NCCL_UINT8, 0, self._stream.cuda_stream)
        self._nccl.groupStart()
        self._communicator.recv(self._received.data_ptr(), *common)
        self._communicator.send(data.data_ptr(), *common)
        self._nccl.groupEnd()

    def end(self) -> torch.Tensor:
        torch.cuda.current_stream().wait_stream(self._stream)
        return self._received


@dataclass(frozen=True)
class Place:
    """Where the ends of one process are opened.

    Attributes:
        rank: of this process, of `world_size`.
        store: of all processes, and its address.
        largest: bytes of a message.
    """

    rank: int
    world_size: int
    store: Store
    address: str
    device: torch.device
    largest: int = max(SIZES.values())

    @property
    def memory(self) -> tuple[int, ...]:
        return (SLOTS * self.largest + FLAG,)


Ends = Mapping[int, End]
"""Those of this process, by rank: both, or one of them."""


def in_one_process(notice: Callable[[torch.Tensor, torch.Tensor], Notice], place: Place) -> Ends:
    """Both ends, with memory that needs no mapping."""
    memory = [torch.zeros(place.memory, dtype=torch.uint8, device=place.device) for _ in range(2)]
    pairs = {0: (memory[0], memory[1]), 1: (memory[1], memory[0])}
    return {end: Mapped(1 - end, *pair, notice(*pair)) for end, pair in pairs.items()}


def by_symmetric_memory(signals: bool, place: Place) -> Ends:
    """Memory of torch's symmetric memory; of one process, two ends in one."""
    from torch.distributed import _symmetric_memory as symmetric

    ends = {place.rank: 1 - place.rank} if place.world_size == 2 else {0: 1, 1: 0}
    torch.distributed.init_process_group(
        "gloo", store=place.store, rank=place.rank, world_size=place.world_size
    )
    shape = (2, *place.memory)
    own = symmetric.empty(shape, dtype=torch.uint8, device=place.device).zero_()
    finish(place.device)
    group = torch.distributed.group.WORLD
    assert group is not None
    handle = symmetric.rendezvous(own, group)
    opened: dict[int, End] = {}
    for end, peer in ends.items():
        rank = peer if place.world_size == 2 else 0
        mine, theirs = own[end], handle.get_buffer(rank, shape, torch.uint8)[peer]
        notice = Signals(handle, rank, end, peer) if signals else StreamFlags(mine, theirs)
        opened[end] = Mapped(peer, mine, theirs, notice)
    return opened


def by_cuda_ipc(place: Place) -> Ends:
    """Memory that the other process opens by its handle, which torch's pickling carries."""
    peer = 1 - place.rank
    mine = torch.zeros(place.memory, dtype=torch.uint8, device=place.device)
    finish(place.device)
    place.store.set(f"memory/{place.rank}", ForkingPickler.dumps(mine).hex())
    theirs = ForkingPickler.loads(bytes.fromhex(place.store.get(f"memory/{peer}").decode()))
    return {place.rank: Mapped(peer, mine, theirs, StreamFlags(mine, theirs))}


def by_backend(backend: str, place: Place) -> Ends:
    communicator = connect(
        backend,
        rank=place.rank,
        world_size=place.world_size,
        address=place.address,
        device=place.device,
        timeout_s=WAIT_S,
    )
    return {place.rank: Messages(communicator, place.largest)}


def idle(place: Place) -> Ends:
    return {end: Idle(1 - end) for end in range(2)}


def to_itself(place: Place) -> Ends:
    return {0: ToItself(place.largest, place.device)}


ONE, TWO = 1, 2
NOTHING = "nothing"
WAYS: Mapping[str, Mapping[tuple[int, str], Callable[[Place], Ends]]] = {
    "cuda": {
        (ONE, NOTHING): idle,
        (ONE, "flags"): partial(in_one_process, StreamFlags),
        (ONE, "signals"): partial(by_symmetric_memory, True),
        (ONE, "NCCL, to itself"): to_itself,
        (TWO, "flags in symmetric memory"): partial(by_symmetric_memory, False),
        (TWO, "signals in symmetric memory"): partial(by_symmetric_memory, True),
        (TWO, "flags in memory of CUDA IPC"): by_cuda_ipc,
        (TWO, "NCCL"): partial(by_backend, "nccl"),
    },
    "cpu": {
        (ONE, NOTHING): idle,
        (ONE, "flags"): partial(in_one_process, HostFlags),
        (TWO, "shm"): partial(by_backend, "shm"),
        (TWO, "gloo"): partial(by_backend, "gloo"),
    },
}
"""By kind of device, then by the number of processes and name."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=sorted(WAYS), default="cuda")
    parser.add_argument("--rounds", type=positive, default=20)
    parser.add_argument("--exchanges", type=positive, default=50, help="of a round")
    add_json(parser)
    options = parser.parse_args()
    report = Report(
        f"bench.gpu.one_sided: exchanges between two ends, {_name(options.device)}",
        COLUMNS,
        seed=0,
        settings=vars(options),
    )
    failed = []
    for processes, way in WAYS[options.device]:
        ends = "two streams" if processes == ONE else "two processes"
        try:
            taken = tried(options.device, processes, way, options.rounds, options.exchanges)
        except RuntimeError as error:
            print(error)
            failed.append(f"{way} of {ends}")
            report.add(ends, way, "-", "failed", "-")
            report.print_last()
            taken = {}
        for message, (device_us, host_us) in taken.items():
            report.add(ends, way, message, f"{device_us:.1f}", f"{host_us:.1f}")
            report.print_last()
        if options.json:
            report.write(options.json)  # after each way: what was measured is kept if time runs out
    report.print()
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


def tried(
    device: str, processes: int, way: str, rounds: int, exchanges: int
) -> dict[str, tuple[float, float]]:
    """Microseconds of the device and of the host, by message, of a way in processes of its own.

    Raises:
        RuntimeError: it failed, or did not end in time; or bytes arrived that were not sent.
    """
    served = serve_store("127.0.0.1")
    work = (served.address, device, way, rounds, exchanges)
    with RankProcesses(processes, measure, *work, device_type=device) as ranks:
        limit = time.monotonic() + LIMIT_S
        while len(ranks.outcomes) < processes:
            if not ranks.listen(max(limit - time.monotonic(), 0)):
                raise RuntimeError(f"{way} did not end within {LIMIT_S:g} s")
            for rank, outcome in ranks.outcomes.items():
                if outcome.error is not None:  # the other waits for it, perhaps without end
                    raise RuntimeError(f"rank {rank}: {outcome.error}")
        taken: dict[str, tuple[float, float]] = ranks.outcomes[0].value
        return taken


def measure(
    rank: int, world_size: int, address: str, device: str, way: str, rounds: int, exchanges: int
) -> dict[str, tuple[float, float]]:
    """What a process does: open its ends, check that messages arrive whole, and time them."""
    if device == "cuda":
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # nobody uses it, and not every machine has it
        gpus = torch.cuda.device_count()
        if gpus < world_size:
            os.environ.update(sharing_environment(None if has_switch() else f"rank{rank}"))
            os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        torch.cuda.set_device(rank % gpus)
    on = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    place = Place(rank, world_size, open_store(address), address, on)
    pair = Pair(WAYS[device][world_size, way](place), place)
    if way != NOTHING:
        pair.check()
    taken = {}
    for message, size in SIZES.items():
        times = [pair.time(size, exchanges) for _ in range(rounds + 1)][1:]
        device_us, host_us = (1e6 * median(seconds) for seconds in zip(*times, strict=True))
        taken[message] = device_us, host_us
    return taken


class Pair:
    """The ends of this process, each with a stream and a message of its own."""

    def __init__(self, ends: Ends, place: Place) -> None:
        self._ends = ends
        self._device = place.device
        self._gated = place.device.type == "cuda" and place.world_size == ONE
        self._streams = {end: torch.cuda.Stream(self._device) for end in ends} if self._on_gpu else {}
        self._messages = {
            end: torch.empty(place.largest, dtype=torch.uint8, device=self._device) for end in ends
        }

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    def check(self, exchanges: int = 20) -> None:
        """Exchange messages that differ each time, of every size, and look at each byte."""
        wrong = {end: torch.zeros((), dtype=torch.int64, device=self._device) for end in self._ends}
        finish(self._device)
        for size in SIZES.values():
            for number in range(exchanges):
                for end in self._ends:
                    with self._on(end):
                        self._messages[end][:size].fill_(_byte(end, number))
                for end, received in self._exchange(size).items():
                    with self._on(end):
                        wrong[end] += (received != _byte(self._ends[end].peer, number)).sum()
        finish(self._device)
        if total := sum(map(int, wrong.values())):
            raise RuntimeError(f"{total} bytes are not those that were sent")

    def time(self, size: int, exchanges: int) -> tuple[float, float]:
        """Seconds of an exchange, by the device's clock, and of the host for giving one end's to the device.

        Where one process drives both ends, the device begins when all is given to it, but for the second
        end's first message: a gate, a kernel that sleeps, is before the first end's. The host's time is not
        in the device's then.
        """
        for gate in range(GATES):
            finish(self._device)
            if not self._on_gpu:
                began = time.perf_counter()
                self._exchange_often(size, exchanges)
                taken = (time.perf_counter() - began) / exchanges
                return taken, taken / len(self._ends)
            first = min(self._ends)
            began_at, ended_at = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with self._on(first):
                if self._gated:
                    torch.cuda._sleep(int(GATE_S * 2**gate * CLOCK_HZ))
                began_at.record()
            began = time.perf_counter()
            self._exchange_often(size, exchanges)
            host_s = time.perf_counter() - began
            late = self._gated and began_at.query()
            with self._on(first):
                ended_at.record()
            finish(self._device)
            if not late:
                device_s = began_at.elapsed_time(ended_at) / 1000
                return device_s / exchanges, host_s / exchanges / len(self._ends)
        raise RuntimeError(f"the host takes more than {GATE_S * 2**gate:g} s for {exchanges} exchanges")

    def _exchange_often(self, size: int, exchanges: int) -> None:
        for _ in range(exchanges):
            self._exchange(size)

    def _exchange(self, size: int) -> dict[int, torch.Tensor]:
        for number, end in self._ends.items():
            with self._on(number):
                end.begin(self._messages[number][:size])
        received = {}
        for number, end in self._ends.items():
            with self._on(number):
                received[number] = end.end()
        return received

    def _on(self, end: int) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._streams[end]) if self._on_gpu else nullcontext()


def _byte(end: int, number: int) -> int:
    return (2 * number + end + 1) % 256


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "a dry run"


if __name__ == "__main__":
    main()
