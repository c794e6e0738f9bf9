"""Exchange between NVIDIA GPUs."""

from __future__ import annotations

import contextlib
import struct
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

import torch

from distriray.collective import gloo
from distriray.collective.all_gather import all_gather
from distriray.collective.backend import BackendCommunicator
from distriray.collective.gloo import GlooCommunicator
from distriray.collective.lifeline import Lifeline
from distriray.collective.messages import Message, as_messages
from distriray.collective.rendezvous import Rendezvous
from distriray.errors import GangBroken

WATCH_INTERVAL_S = 0.05
FAREWELL_S = 5.0


class NcclWork:
    """One group of transfers on the communicator's stream.

    `wait` orders the current stream behind it and returns. A failure that comes later shows in `broken` and
    in every later call: after bringing received values to the host, call `check` before trusting them.

    The work holds its tensors, so that the allocator cannot give their memory away under a transfer: until
    the current stream is behind it, or it is over.
    """

    def __init__(self, owner: NcclCommunicator, peers: list[int], messages: list[Message]) -> None:
        self._owner = owner
        self._messages = messages
        self.peers = peers
        self.begun = torch.cuda.Event()
        self.done = torch.cuda.Event()
        self.begun_at: float | None = None

    def wait(self) -> None:
        self._owner.check()
        torch.cuda.current_stream(self._owner.device).wait_event(self.done)
        self._messages = []


class NcclCommunicator(BackendCommunicator):
    """A gang over NCCL, on a stream of its own, beside any number of others in the same process.

    NCCL reports neither a dead nor a hung peer: its kernels spin forever. So a watchdog thread aborts the
    communicator when a transfer outlasts `timeout_s`, counted from when the stream reaches it, or when NCCL
    reports an error, and a `Lifeline` aborts it as soon as a peer's process dies. A communicator that breaks
    with nothing in flight is kept until it is closed: to release one waits for all that the device does, for
    transfers of other gangs too.

    Args:
        control: a gloo communicator of the same ranks, for no other use.
        device: this rank's GPU; no two ranks may share one.
        timeout_s: how long starting, and later each transfer, may take.

    Raises:
        ModuleNotFoundError: CuPy with NCCL is not installed.
        GangBroken: NCCL could not connect the ranks within `timeout_s`.
    """

    backend = "nccl"

    def __init__(self, control: GlooCommunicator, device: torch.device, timeout_s: float) -> None:
        self._nccl = load_nccl()
        super().__init__(control.rank, control.world_size, device)
        self._timeout_s = timeout_s
        self._calling = threading.Lock()
        self._releasing = threading.Lock()
        self._released = False
        self._called: tuple[float, list[int]] | None = None
        self._pending: deque[NcclWork] = deque()
        self._over: deque[NcclWork] = deque()
        self._closing = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, name="distriray-nccl-watchdog", daemon=True)
        try:
            self._communicator = self._start(self._agree_on_identity(control))
        except BaseException:
            control.close()
            raise
        self._stream = _take_stream(self.device)
        self._lifeline = Lifeline(control, self._fail)
        self._lifeline.watch()
        self._watchdog.start()
        self._greet()

    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> NcclWork:
        self.check()  # before the lock, which an abort may hold for a while
        incoming = as_messages(receives, self.rank, self.world_size, self.device)
        outgoing = as_messages(sends, self.rank, self.world_size, self.device)
        work = NcclWork(self, sorted({*receives, *sends}), [*incoming, *outgoing])
        stream = self._stream
        self._over.clear()  # here, since freeing events can hang with the device, and the watchdog must not
        cause = None
        with self._calling, torch.cuda.device(self.device):
            self.check()
            stream.wait_stream(torch.cuda.current_stream(self.device))
            work.begun.record(stream)
            self._called = time.monotonic(), work.peers
            try:
                self._enqueue(incoming, outgoing)
            except Exception as error:  # CuPy raises KeyError for the error codes that it does not know
                cause = f"NCCL failed between rank {self.rank} and ranks {work.peers}: {error!r}"
            self._called = None
            work.done.record(stream)
            self._pending.append(work)
        if cause is not None:
            raise self._fail(cause)
        self._bytes_sent += sum(data.numel() for _, data in outgoing)
        return work

    def _enqueue(self, incoming: list[Message], outgoing: list[Message]) -> None:
        """One group, so that sends and receives progress together and cannot wait for each other."""
        kind, stream = self._nccl.NCCL_UINT8, self._stream.cuda_stream
        self._nccl.groupStart()
        try:
            for peer, data in incoming:
                self._communicator.recv(data.data_ptr(), data.numel(), kind, peer, stream)
            for peer, data in outgoing:
                self._communicator.send(data.data_ptr(), data.numel(), kind, peer, stream)
        finally:
            self._nccl.groupEnd()

    def close(self) -> None:
        """Finish what is in flight, wait up to five seconds for the peers to be done too, and release."""
        if not self.broken:
            with contextlib.suppress(GangBroken):
                self._await(self._stream.query, self._timeout_s, "finish what is in flight")
                self._lifeline.part(FAREWELL_S)
        super().close()
        self._end()
        self._closing.set()
        if threading.current_thread() is not self._watchdog:
            self._watchdog.join()

    def _agree_on_identity(self, control: GlooCommunicator) -> bytes:
        """NCCL's unique id, made by rank 0."""
        if self.rank == 0:
            try:
                numbers = self._nccl.get_unique_id()
            except Exception as error:
                raise GangBroken(f"NCCL finds no way to its peers: {error!r}") from error
            identity = torch.tensor([number & 0xFF for number in numbers], dtype=torch.uint8)
            control.exchange(dict.fromkeys(self.peers, identity), {}).wait()
        else:
            identity = torch.empty(128, dtype=torch.uint8)
            control.exchange({}, {0: identity}).wait()
        return bytes(identity.tolist())

    def _start(self, identity: bytes) -> Any:
        """Join the ranks in a thread, since NCCL itself would wait for a lost peer without end."""
        result: list[Any] = []

        def start() -> None:
            try:
                torch.cuda.set_device(self.device)
                result.append(self._nccl.NcclCommunicator(self.world_size, _for_cupy(identity), self.rank))
            except Exception as error:
                result.append(error)

        thread = threading.Thread(target=start, name="distriray-nccl-start", daemon=True)
        thread.start()
        thread.join(self._timeout_s)
        if not result:
            raise GangBroken(f"NCCL could not connect {self.world_size} ranks within {self._timeout_s:g} s")
        if isinstance(result[0], Exception):
            raise GangBroken(f"NCCL could not connect {self.world_size} ranks: {result[0]!r}") from result[0]
        return result[0]

    def _greet(self) -> None:
        """Exchange one byte with every peer: NCCL connects each pair at its first transfer.

        On a stream of its own, so that this does not wait for what the device has been given to compute.
        """
        try:
            with torch.cuda.stream(torch.cuda.Stream(self.device)):
                hello = torch.ones(self.world_size, 1, dtype=torch.uint8, device=self.device)
                all_gather(self, hello.unbind())
            self._await(self._stream.query, self._timeout_s, "exchange the first byte")
        except GangBroken:
            self.close()
            raise
        self._bytes_sent = 0

    def _await(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            self.check()
            if time.monotonic() > deadline:
                raise self._fail(f"rank {self.rank} could not {what} within {timeout_s:g} s")
            time.sleep(0.001)

    def _release(self) -> None:
        self._lifeline.cut()
        # A call that hangs inside NCCL holds the lock, and only the abort frees it.
        locked = self._calling.acquire(timeout=0.5)
        try:
            if self._pending or not locked:
                self._end()
        finally:
            if locked:
                self._calling.release()
        _give_back(self._stream)

    def _end(self) -> None:
        """End what is in flight, and release all. Once; whoever comes later waits until that is done."""
        with self._releasing:
            if self._released:
                return
            self._released = True
            with torch.cuda.device(self.device):
                self._communicator.abort()
            self._pending.clear()  # nothing is in flight any more

    def _watch(self) -> None:
        # A new thread is on GPU 0, and asking an event there would give this process a context on it.
        torch.cuda.set_device(self.device)
        while not self.broken and not self._closing.wait(WATCH_INTERVAL_S):
            cause = self._complaint()
            if cause is not None:
                self._fail(cause)

    def _complaint(self) -> str | None:
        now = time.monotonic()
        called = self._called
        if called is not None and now - called[0] > self._timeout_s:
            return f"ranks {called[1]} did not connect within {self._timeout_s:g} s"
        try:
            while self._pending and self._pending[0].done.query():
                self._over.append(self._pending.popleft())
            if self._pending and self._pending[0].begun.query():
                oldest = self._pending[0]
                oldest.begun_at = oldest.begun_at or now
                if now - oldest.begun_at > self._timeout_s:
                    return f"a transfer with ranks {oldest.peers} did not end within {self._timeout_s:g} s"
            if self._calling.acquire(blocking=False):
                try:
                    self._communicator.check_async_error()
                finally:
                    self._calling.release()
        except Exception as error:
            return f"rank {self.rank} failed while it exchanged with its gang: {error!r}"
        return None


def join(rendezvous: Rendezvous) -> NcclCommunicator:
    """Connect the ranks over gloo first, which carries NCCL's id and then watches over the processes."""
    load_nccl()  # before anybody waits for this rank
    return NcclCommunicator(gloo.join(rendezvous), rendezvous.device, rendezvous.timeout_s)


_idle_streams: dict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)


def _take_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that no other communicator of this process uses, whose kernels go before computing ones.

    Torch deals 32 streams in turn, so taking a new one each time would let two gangs share one in the end.
    """
    return _idle_streams[device].pop() if _idle_streams[device] else torch.cuda.Stream(device, priority=-1)


def _give_back(stream: torch.cuda.Stream) -> None:
    _idle_streams[stream.device].append(stream)


def _for_cupy(identity: bytes) -> bytes | tuple[int, ...]:
    """CuPy 14 takes the id as bytes, CuPy 13 as a tuple of signed characters."""
    import cupy

    return identity if int(cupy.__version__.split(".")[0]) >= 14 else struct.unpack("128b", identity)


def load_nccl() -> Any:
    """CuPy's NCCL module, or the error that says what to install."""
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        raise ModuleNotFoundError(
            "backend 'nccl' needs CuPy with NCCL; install 'distriray[cuda12]' or 'distriray[cuda13]'"
        ) from error
    if not getattr(nccl, "available", False):
        raise ModuleNotFoundError("CuPy is installed but finds no NCCL; install 'nvidia-nccl-cu12'")
    return nccl
