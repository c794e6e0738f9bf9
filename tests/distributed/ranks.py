"""Ranks that tests watch, kill and stop."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from distriray.collective.processes import Outcome, RankProcesses


class Ranks(RankProcesses):
    """Processes of which each value that `function` yields is a milestone that a test can await."""

    def milestone(self, rank: int, timeout_s: float = 60.0) -> Any:
        """The next value that `rank` yields."""
        deadline = time.monotonic() + timeout_s
        while not self.reports[rank]:
            if rank in self.outcomes:
                raise AssertionError(f"rank {rank} ended before its milestone: {self.outcomes[rank]}")
            if not self.listen(max(deadline - time.monotonic(), 0)):
                raise AssertionError(f"rank {rank} did not reach its milestone within {timeout_s:g} s")
        return self.reports[rank].popleft()

    def kill(self, rank: int) -> None:
        """End a rank as a crash or the kernel would, without a chance to say goodbye."""
        os.kill(self.pid(rank), signal.SIGKILL)

    def stop(self, rank: int) -> None:
        """Hang a rank: it keeps its connections and does nothing."""
        os.kill(self.pid(rank), signal.SIGSTOP)

    def join(self, timeout_s: float = 60.0, ranks: list[int] | None = None) -> list[Outcome]:
        """The outcomes of the given ranks, or of all, in order; outlasting `timeout_s` fails the test."""
        awaited = list(range(len(self.reports))) if ranks is None else ranks
        deadline = time.monotonic() + timeout_s
        while missing := sorted(set(awaited) - self.outcomes.keys()):
            if not self.listen(max(deadline - time.monotonic(), 0)):
                raise AssertionError(
                    f"ranks {missing} did not end within {timeout_s:g} s; others: {self.outcomes}"
                )
        return [self.outcomes[rank] for rank in awaited]


def run_processes(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout_s: float = 60.0,
    device_type: str = "cpu",
) -> list[Any]:
    """What `function(rank, world_size, *arguments)` returns on each rank, in the order of ranks.

    Raises:
        RuntimeError: a rank failed; the message holds its traceback.
        AssertionError: a rank did not end within `timeout_s`. All others are ended.
    """
    with Ranks(world_size, function, *arguments, device_type=device_type) as ranks:
        outcomes = ranks.join(timeout_s)
    errors = [f"rank {rank}: {outcome.error}" for rank, outcome in enumerate(outcomes) if outcome.error]
    if errors:
        raise RuntimeError("\n".join(errors))
    return [outcome.value for outcome in outcomes]


def free_address() -> str:
    """`host:port` on this machine where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"
