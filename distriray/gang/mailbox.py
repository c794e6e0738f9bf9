"""A running segment's mailbox: signals go in, progress comes out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from distriray.gang.messages import Progress, StopSignal


class Mailbox:
    """Mailbox of one worker's segments, one at a time. All methods may be called from any thread.

    Args:
        on_signal: called with a signal for the segment that steps now, or is about to.
        on_progress: called after every report, and when a segment ends.
    """

    def __init__(self, on_signal: Callable[[StopSignal], None], on_progress: Callable[[], None]) -> None:
        self._on_signal, self._on_progress = on_signal, on_progress
        self._lock = threading.Lock()
        self._signals: dict[int, StopSignal] = {}
        self._running: int | None = None
        self._stepping = False
        self._ended = -1
        self._step = self._num_steps = 0
        self._previews: list[tuple[int, Any]] = []

    @contextmanager
    def running(self, serial: int, step: int) -> Iterator[None]:
        """The time of segment `serial`, which begins at `step`."""
        with self._lock:
            self._running, self._step, self._previews = serial, step, []
        try:
            yield
        finally:
            with self._lock:
                self._running, self._ended = None, serial
                self._signals = {s: signal for s, signal in self._signals.items() if s > serial}
            self._on_progress()

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """The time in which the segment that runs can be signalled; what came before is passed on now."""
        with self._lock:
            self._stepping = True
            if self._running is not None and (signal := self._signals.get(self._running)) is not None:
                self._on_signal(signal)
        try:
            yield
        finally:
            with self._lock:
                self._stepping = False

    def stop(self, serial: int, signal: StopSignal) -> None:
        """Let segment `serial` leave after the step it is in; nothing happens if it is over already."""
        with self._lock:
            if serial <= self._ended:
                return
            if self._signals.get(serial) is not StopSignal.CANCEL:
                self._signals[serial] = signal
            if self._running == serial and self._stepping:
                self._on_signal(signal)

    def report(self, step: int, num_steps: int, preview: Any | None = None) -> None:
        """The running segment has done `step` steps; `preview` shows the picture then."""
        with self._lock:
            self._step, self._num_steps = step, num_steps
            if preview is not None:
                self._previews.append((step, preview))
        self._on_progress()

    def progress(self, serial: int) -> Progress:
        """Progress of segment `serial`."""
        with self._lock:
            if serial != self._running:
                return Progress(0, 0, serial <= self._ended)
            return Progress(self._step, self._num_steps, False, tuple(self._previews))

    @property
    def previews(self) -> tuple[tuple[int, Any], ...]:
        """The previews of the segment that runs."""
        with self._lock:
            return tuple(self._previews)
