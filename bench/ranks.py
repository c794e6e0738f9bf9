"""Run a function in N fresh processes, meddle with them, and collect what became of each."""

from __future__ import annotations

import inspect
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

import torch

from distriray.collective import Communicator, backend_of, connect

# A server that has imported the heavy packages forks each rank: fresh processes without seconds of import.
_context = get_context("forkserver")
_context.set_forkserver_preload(["distriray.parallel", "diffusers.pipelines.stable_diffusion_xl"])


@dataclass
class Outcome:
    """What became of a rank: its return value, or the traceback of what it raised, or how it was ended."""

    value: Any = None
    error: str | None = None


class Ranks:
    """`function(rank, world_size, *args)` in `world_size` processes with one torch thread each.

    The function is module-level. If it is a generator function, each `yield` is a milestone that a test can
    await before it kills or stops a rank; what it returns is the rank's value. Leaving the `with` block ends
    every process that is left.
    """

    def __init__(self, function: Callable[..., Any], world_size: int, *args: Any) -> None:
        self._processes = []
        self._connections: list[Connection] = []
        self._outcomes: dict[int, Outcome] = {}
        self._milestones: list[list[Any]] = [[] for _ in range(world_size)]
        for rank in range(world_size):
            here, there = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_run, args=(there, function, rank, world_size, args), daemon=True
            )
            process.start()
            there.close()
            self._processes.append(process)
            self._connections.append(here)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def milestone(self, rank: int, timeout_s: float = 60.0) -> Any:
        """The next value that `rank` yields."""
        deadline = time.monotonic() + timeout_s
        while not self._milestones[rank]:
            if rank in self._outcomes:
                raise AssertionError(f"rank {rank} ended before its milestone: {self._outcomes[rank]}")
            self._listen(deadline, f"rank {rank} did not reach its milestone within {timeout_s:g} s")
        return self._milestones[rank].pop(0)

    def kill(self, rank: int) -> None:
        """End a rank as a crash or the kernel would, without a chance to say goodbye."""
        self._processes[rank].kill()

    def stop(self, rank: int) -> None:
        """Hang a rank: it keeps its connections and does nothing."""
        pid = self._processes[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)

    def join(self, timeout_s: float = 60.0, ranks: list[int] | None = None) -> list[Outcome]:
        """What became of the given ranks, or of all, in order; outlasting `timeout_s` fails the test."""
        awaited = range(len(self._processes)) if ranks is None else ranks
        deadline = time.monotonic() + timeout_s
        while not self._outcomes.keys() >= set(awaited):
            missing = sorted(set(awaited) - self._outcomes.keys())
            self._listen(
                deadline, f"ranks {missing} did not end within {timeout_s:g} s; others: {self._outcomes}"
            )
        return [self._outcomes[rank] for rank in awaited]

    def _listen(self, deadline: float, complaint: str) -> None:
        pending = [
            self._connections[rank] for rank in range(len(self._processes)) if rank not in self._outcomes
        ]
        ready = wait(pending, max(deadline - time.monotonic(), 0))
        if not ready:
            raise AssertionError(complaint)
        for rank, connection in enumerate(self._connections):
            if connection not in ready:
                continue
            try:
                kind, content = pickle.loads(connection.recv_bytes())
            except EOFError:
                self._processes[rank].join()
                self._outcomes[rank] = Outcome(error=f"ended with exit code {self._processes[rank].exitcode}")
                continue
            if kind == "milestone":
                self._milestones[rank].append(content)
            else:
                self._outcomes[rank] = content


def run_processes(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 60.0
) -> list[Any]:
    """What `function(rank, world_size, *arguments)` returns on each rank, in the order of ranks.

    Raises:
        RuntimeError: a rank failed; the message holds its traceback.
        AssertionError: a rank did not end within `timeout_s`. All others are ended.
    """
    with Ranks(function, world_size, *arguments) as ranks:
        outcomes = ranks.join(timeout_s)
    errors = [f"rank {rank}: {outcome.error}" for rank, outcome in enumerate(outcomes) if outcome.error]
    if errors:
        raise RuntimeError("\n".join(errors))
    return [outcome.value for outcome in outcomes]


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    device: str = "cpu",
    timeout_s: float = 3600.0,
) -> list[Any]:
    """`run_processes` of `function(communicator, *arguments)`, with a communicator that joins the ranks.

    On the device `cuda` rank i has GPU i.
    """
    address = free_address()
    return run_processes(world_size, _joined, address, device, function, arguments, timeout_s=timeout_s)


def barrier(communicator: Communicator) -> None:
    """Return once every rank has come here; waiting costs no CPU."""
    others = [rank for rank in range(communicator.world_size) if rank != communicator.rank]
    token = torch.zeros(1, device=communicator.device)
    communicator.exchange(dict.fromkeys(others, token), {r: torch.empty_like(token) for r in others}).wait()
    if communicator.device.type == "cuda":
        torch.cuda.synchronize(communicator.device)


def free_address() -> str:
    """`host:port` on this machine where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def _joined(
    rank: int,
    world_size: int,
    address: str,
    device: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> Any:
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    communicator = connect(
        backend_of(place.type, world_size),
        rank=rank,
        world_size=world_size,
        address=address,
        timeout_s=120,
        device=place,
    )
    return function(communicator, *arguments)


def _run(
    connection: Connection, function: Callable[..., Any], rank: int, world_size: int, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        value = function(rank, world_size, *args)
        if inspect.isgenerator(value):
            value = _milestones(value, connection)
        message = _packed("outcome", Outcome(value=value))
    except BaseException:
        message = _packed("outcome", Outcome(error=traceback.format_exc()))
    connection.send_bytes(message)


def _milestones(generator: Any, connection: Connection) -> Any:
    while True:
        try:
            connection.send_bytes(_packed("milestone", next(generator)))
        except StopIteration as end:
            return end.value


def _packed(kind: str, content: Any) -> bytes:
    """Plain pickle copies tensors; the pipe's own would share their memory, which ends with the process."""
    return pickle.dumps((kind, content))
