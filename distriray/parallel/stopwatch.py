"""Time of a device's work, measured without stopping it."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TypeAlias

import torch

Mark: TypeAlias = "float | torch.cuda.Event"
"""A point in the work of a device: of a GPU's current stream, or of the processor."""


def mark(device: torch.device) -> Mark:
    """The point that has been reached; on a GPU, behind all that was given to its current stream."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(first: Mark, then: Mark) -> float:
    """Seconds from one mark to a later one; waits until the device has reached that."""
    if isinstance(first, float) or isinstance(then, float):
        assert isinstance(first, float) and isinstance(then, float), "two devices have no time in common"
        return then - first
    then.synchronize()
    return float(first.elapsed_time(then)) / 1000


class Stopwatch:
    """A context manager that times what is done within it, as often as it is entered.

    A GPU works behind the host. So nothing is known when the block ends: `seconds` waits for the device, and
    whoever must not stop it asks a step later.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._began: Mark = 0.0
        self._stretches: list[tuple[Mark, Mark]] = []

    def __enter__(self) -> Stopwatch:
        self._began = mark(self._device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stretches.append((self._began, mark(self._device)))

    @property
    def seconds(self) -> float:
        """Of all stretches together; on a GPU this waits until the last of them is over."""
        return sum(seconds_between(first, then) for first, then in self._stretches)
