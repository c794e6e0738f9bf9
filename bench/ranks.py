"""Run one function on several ranks, each a process with one torch thread, joined by gloo."""

from __future__ import annotations

import multiprocessing
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

from distriray.collective import Communicator, connect

# One server imports the heavy packages once, and every rank is a fork of it.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["distriray.parallel", "diffusers.pipelines.stable_diffusion_xl"])


def free_address() -> str:
    """`host:port` on this machine where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(communicator, *arguments)` of every rank, in the order of ranks.

    Raises:
        RuntimeError: a rank failed; the message holds its traceback. The others are ended.
    """
    address = free_address()
    ranks = []
    for rank in range(world_size):
        here, there = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(
            target=_rank, args=(there, rank, world_size, address, function, arguments), daemon=True
        )
        process.start()
        there.close()
        ranks.append((process, here))
    try:
        results = []
        for rank, (process, here) in enumerate(ranks):
            try:
                failed, result = pickle.loads(here.recv_bytes())
            except EOFError:
                process.join(5)
                raise RuntimeError(f"rank {rank} ended with exit code {process.exitcode}") from None
            if failed:
                raise RuntimeError(f"rank {rank} failed:\n{result}")
            results.append(result)
        return results
    finally:
        for process, _ in ranks:
            process.join(5)
            process.kill()


def _rank(
    pipe: Any,
    rank: int,
    world_size: int,
    address: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        communicator: Communicator = (
            connect("gloo", rank=rank, world_size=world_size, address=address, timeout_s=120)
            if world_size > 1
            else connect("local")
        )
        outcome = (False, function(communicator, *arguments))
    except BaseException:
        outcome = (True, traceback.format_exc())
    # Plain pickle copies tensors; the pipe would share their memory, which ends with this process.
    pipe.send_bytes(pickle.dumps(outcome))
