"""CUDA's streams and events in threads of one process: a device for each rank, and a thread for each stream.

A device is a `cpu:i`, whose tensors are the CPU's. What a test computes runs when its stream gets there, and
so does a transfer; so an order that nobody asked the streams to keep is not kept. Memory is torch's, which
knows no streams: a test keeps what a transfer may still touch.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch


class FakeCuda:
    """All devices of a process.

    Args:
        jitter_s: the longest pause of a stream before each thing that it does.
        one_queue: all streams of a device go through one queue, as streams do that share a hardware queue.

    Attributes:
        errors: what went wrong inside streams, and threads that did not say which device they mean.
    """

    def __init__(self, jitter_s: float = 0.0, one_queue: bool = False) -> None:
        self.jitter_s, self.one_queue = jitter_s, one_queue
        self.moved = threading.Condition()
        self.errors: list[Exception] = []
        self.streams: list[Stream] = []
        self._closed = False
        self._thread = threading.local()
        self._queues: dict[torch.device, Queue] = {}
        self._defaults: dict[torch.device, Stream] = {}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take the place of torch.cuda until the test is over."""
        for name in ("current_stream", "set_device", "device", "stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority=0: Stream(self, device, priority))
        monkeypatch.setattr(torch.cuda, "Event", lambda: Event(self))

    def place(self) -> torch.device:
        """The device of this thread."""
        device: torch.device | None = getattr(self._thread, "device", None)
        if device is None:
            name = threading.current_thread().name
            self.errors.append(RuntimeError(f"thread {name} would use GPU 0: it set no device"))
            raise self.errors[-1]
        return device

    def set_device(self, device: torch.device | None) -> None:
        self._thread.device = device

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before = getattr(self._thread, "device", None)
        self.set_device(device)
        try:
            yield
        finally:
            self.set_device(before)

    def current_stream(self, device: torch.device | None = None) -> Stream:
        device = device or self.place()
        current: dict[torch.device, Stream] = self._thread.__dict__.setdefault("streams", {})
        with self.moved:
            if device not in self._defaults:
                self._defaults[device] = Stream(self, device)
        return current.get(device, self._defaults[device])

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = self.current_stream(stream.device)
        self._thread.streams[stream.device] = stream
        try:
            yield
        finally:
            self._thread.streams[stream.device] = before

    def compute(self, kernel: Callable[[], Any]) -> None:
        """Let the current stream call `kernel` when it gets there."""
        self.current_stream().launch(kernel)

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The values of `tensor` once the current stream is idle."""
        self.until(self.current_stream().query)
        return tensor.clone()

    def queue(self, device: torch.device) -> Queue:
        if not self.one_queue:
            return Queue(self)
        with self.moved:
            if device not in self._queues:
                self._queues[device] = Queue(self)
            return self._queues[device]

    def until(self, condition: Callable[[], bool]) -> None:
        with self.moved:
            self.moved.wait_for(lambda: self._closed or condition())

    def close(self) -> None:
        """End whatever still waits, and all threads."""
        with self.moved:
            self._closed = True
            self.moved.notify_all()
        for stream in self.streams:
            stream.queue.close()


class Queue:
    """One thing after another, in a thread of its own."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self._items: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self.put = self._items.put
        self._thread = threading.Thread(target=self._run, name="fake-cuda", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.put(None)
        self._thread.join(5)

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            time.sleep(random.uniform(0, self._cuda.jitter_s))
            item()


class Stream:
    """Counts what it was given and what it has done."""

    def __init__(self, cuda: FakeCuda, device: torch.device, priority: int = 0) -> None:
        self._cuda, self.device, self.priority = cuda, device, priority
        self.queue = cuda.queue(device)
        self.given = self.done = 0
        with cuda.moved:
            self.cuda_stream = len(cuda.streams)
            cuda.streams.append(self)

    def launch(self, kernel: Callable[[], Any]) -> int:
        """`done` once it has done this too."""

        def run() -> None:
            try:
                kernel()
            except Exception as error:
                self._cuda.errors.append(error)
            with self._cuda.moved:
                self.done += 1
                self._cuda.moved.notify_all()

        with self._cuda.moved:
            self.given += 1
            self.queue.put(run)
            return self.given

    def query(self) -> bool:
        self._cuda.place()
        return self.done == self.given

    def wait_event(self, event: Event) -> None:
        stream, target = event.stream, event.target
        self.launch(lambda: self._cuda.until(lambda: stream is None or stream.done >= target))

    def wait_stream(self, stream: Stream) -> None:
        event = Event(self._cuda)
        event.record(stream)
        self.wait_event(event)


class Event:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.stream: Stream | None = None
        self.target = 0

    def record(self, stream: Stream) -> None:
        self.stream, self.target = stream, stream.launch(lambda: None)

    def query(self) -> bool:
        self._cuda.place()
        return self.stream is None or self.stream.done >= self.target
