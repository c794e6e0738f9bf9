"""Starting the ranks of a gang with a function call."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch

from distriray.collective.connect import connect
from distriray.collective.processes import RankProcesses
from distriray.collective.registry import backends_named
from distriray.collective.store import serve_store
from distriray.errors import NotEnoughDevices, RankFailed

GRACE_S = 5.0
"""Time for the other ranks to end by themselves once one has failed."""


def launch(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    device: str = "cpu",
    backend: str | None = None,
    timeout_s: float = 120.0,
) -> list[Any]:
    """Run `function(communicator, *arguments)` in `world_size` processes of this machine that form a gang.

    A program that calls this guards its own start with `if __name__ == "__main__":`, since every process
    imports it. Each process has one torch thread and its own copy of the arguments. Results are copied too:
    return tensors on the CPU.

    Args:
        world_size: number of ranks.
        function: defined at the top level of a module.
        arguments: what follows the communicator; values that pickle takes.
        device: `cpu`, or `cuda`: rank i has GPU i.
        backend: of the communicator, as `connect` takes it: the best that there is, unless given.
        timeout_s: of the communicator: how long joining may take, and later each wait for a peer.

    Returns:
        What each rank returned, in the order of ranks.

    Raises:
        NotEnoughDevices: there are fewer GPUs than ranks.
        RankFailed: a rank raised or died. The message holds its traceback, then those of the ranks that
            failed with it; all others are ended.
        ValueError: `world_size` is less than 1, `backend` does not move tensors of `device`, or no backend
            does, or the function or an argument cannot be sent to another process.
    """
    if world_size < 1:
        raise ValueError(f"a gang has at least one rank, not {world_size}")
    backends_named(backend, device, world_size)
    if device == "cuda" and torch.cuda.device_count() < world_size:
        raise NotEnoughDevices(
            f"{world_size} ranks on device 'cuda' need {world_size} GPUs; this machine has "
            f"{torch.cuda.device_count()}"
        )
    served = serve_store("127.0.0.1")
    work = (served.address, backend, device, timeout_s, function, arguments)
    with RankProcesses(world_size, _joined, *work, device_type=device) as ranks:
        while len(ranks.outcomes) < world_size and not _failures(ranks):
            ranks.listen()
        deadline = time.monotonic() + GRACE_S
        while len(ranks.outcomes) < world_size and ranks.listen(max(deadline - time.monotonic(), 0)):
            pass
        failures = _failures(ranks)
        if failures:
            raise RankFailed("\n".join(f"rank {rank} failed: {error}" for rank, error in failures.items()))
        return [ranks.outcomes[rank].value for rank in range(world_size)]


def _failures(ranks: RankProcesses) -> dict[int, str]:
    return {rank: outcome.error for rank, outcome in ranks.outcomes.items() if outcome.error is not None}


def _joined(
    rank: int,
    world_size: int,
    address: str,
    backend: str | None,
    device: str,
    timeout_s: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> Any:
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    with closing(
        connect(
            backend,
            rank=rank,
            world_size=world_size,
            address=address,
            timeout_s=timeout_s,
            device=place,
        )
    ) as communicator:
        return function(communicator, *arguments)
