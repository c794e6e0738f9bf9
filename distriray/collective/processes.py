"""Fresh processes, one a rank: started, listened to, and ended."""

from __future__ import annotations

import inspect
import os
import pickle
import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any, Self

import torch


@dataclass(frozen=True)
class Outcome:
    """The end of a rank: its return value, or the traceback of what it raised, or how it was ended."""

    value: Any = None
    error: str | None = None


class RankProcesses:
    """`function(rank, world_size, *arguments)` in `world_size` fresh processes with one torch thread each.

    The function is defined at the top level of a module. If it is a generator function, each value that it
    yields is a report, and what it returns is the rank's value. Arguments, reports and values are copied.
    Leaving the `with` block kills the processes that are left, and so does the end of this process.

    Attributes:
        outcomes: by rank, in the order in which ranks ended.
        reports: by rank, what it has reported and nobody has taken yet.

    Args:
        device_type: of the device that the ranks will use; it decides how they start (`start_method`).

    Raises:
        ValueError: the function or an argument cannot be sent to another process.
    """

    def __init__(
        self, world_size: int, function: Callable[..., Any], *arguments: Any, device_type: str = "cpu"
    ) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self.reports: list[deque[Any]] = [deque() for _ in range(world_size)]
        self._processes: list[Any] = []
        self._connections: dict[int, Connection] = {}
        try:
            work = pickle.dumps((function, arguments))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{function!r} and its arguments cannot be sent to other processes ({error}); define the "
                "function at the top level of a module, and pass values that pickle takes"
            ) from error
        context = start_method(device_type)
        for rank in range(world_size):
            here, there = context.Pipe(duplex=False)
            process = context.Process(  # type: ignore[attr-defined]
                target=_run, args=(there, work, rank, world_size), name=f"rank {rank}", daemon=True
            )
            process.start()
            there.close()
            self._processes.append(process)
            self._connections[rank] = here

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def pid(self, rank: int) -> int:
        """The process of a rank."""
        pid: int = self._processes[rank].pid
        return pid

    def listen(self, timeout_s: float | None = None) -> bool:
        """Take in reports and outcomes, waiting at most `timeout_s` for the first; False if none has come."""
        pending = {
            connection: rank for rank, connection in self._connections.items() if rank not in self.outcomes
        }
        ready = wait(list(pending), timeout_s)
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = pending[connection]
            try:
                content = pickle.loads(connection.recv_bytes())
            except (EOFError, OSError):  # it ended before it had sent anything, or in the midst of it
                self._processes[rank].join()
                content = Outcome(error=f"it ended with exit code {self._processes[rank].exitcode}")
            if isinstance(content, Outcome):
                self.outcomes[rank] = content
            else:
                self.reports[rank].append(content.value)
        return bool(ready)


@dataclass(frozen=True)
class _Report:
    value: Any


def start_method(device_type: str) -> BaseContext:
    """The way to start processes that will use a device of this type.

    On CPUs a server forks them, at once if the program has told `multiprocessing` what to import in advance
    (`set_forkserver_preload`). CUDA does not survive a fork, and merely importing diffusers initializes it,
    so processes that use it are started afresh. See `docs/decisions/how-ranks-start.md`.
    """
    return get_context("spawn" if device_type == "cuda" else "forkserver")


def _run(connection: Connection, work: bytes, rank: int, world_size: int) -> None:
    threading.Thread(target=_end_with_parent, name="distriray-parent", daemon=True).start()
    torch.set_num_threads(1)
    try:
        function, arguments = pickle.loads(work)
        value = function(rank, world_size, *arguments)
        if inspect.isgenerator(value):
            value = _reported(value, connection)
        message = pickle.dumps(Outcome(value=value))
    except BaseException:
        message = pickle.dumps(Outcome(error=traceback.format_exc()))
    connection.send_bytes(message)  # not `send`, which would share tensors' memory, and that ends here


def _end_with_parent() -> None:
    """Nobody is left to take what this rank may yet find, or to end it."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _reported(generator: Any, connection: Connection) -> Any:
    while True:
        try:
            report = _Report(next(generator))
        except StopIteration as end:
            return end.value
        connection.send_bytes(pickle.dumps(report))
