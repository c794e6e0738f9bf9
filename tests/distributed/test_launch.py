"""Gangs that are started by a function call."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import wait

import psutil
import pytest
import torch

from distriray.collective import Communicator, all_gather, launch
from distriray.collective.processes import RankProcesses
from distriray.errors import NotEnoughDevices, RankFailed
from tests.distributed.ranks import run_processes

pytestmark = pytest.mark.distributed


def _sum(communicator: Communicator, numbers: torch.Tensor, factor: float) -> tuple[int, torch.Tensor]:
    numbers += communicator.rank  # its own copy
    parts = [torch.zeros_like(numbers) for _ in range(communicator.world_size)]
    parts[communicator.rank] = numbers * factor
    all_gather(communicator, parts).wait()
    return torch.get_num_threads(), torch.stack(parts).sum(0)


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_form_a_gang_and_return_in_order(ranks: int) -> None:
    numbers = torch.tensor([1.0, 10.0])
    results = launch(ranks, _sum, numbers, 2.0)
    expected = 2 * (ranks * numbers + sum(range(ranks)))
    assert [threads for threads, _ in results] == [1] * ranks
    assert all(torch.equal(total, expected) for _, total in results)
    assert numbers.tolist() == [1.0, 10.0]


def _rank(communicator: Communicator) -> int:
    return communicator.rank


def test_results_are_in_the_order_of_ranks() -> None:
    assert launch(4, _rank) == [0, 1, 2, 3]


def _much(rank: int, world_size: int) -> bytes:
    return bytes(2**24)  # more than a pipe holds


def test_a_rank_that_dies_while_it_returns_its_result_is_named() -> None:
    with RankProcesses(1, _much) as ranks:
        wait(ranks._connections.values())
        os.kill(ranks.pid(0), signal.SIGKILL)
        ranks._processes[0].join()
        assert ranks.listen(10.0)
        assert ranks.outcomes[0].error == "it ended with exit code -9"


def _one_fails(communicator: Communicator, how: str) -> None:
    if communicator.rank == 1:
        if how == "raises":
            raise ZeroDivisionError("out of paint")
        os.kill(os.getpid(), signal.SIGKILL)
    if communicator.rank == 0:
        communicator.exchange({}, {1: torch.empty(1)}).wait()
    time.sleep(60)  # a rank that does not notice


@pytest.mark.parametrize(
    ("how", "said"), [("raises", "ZeroDivisionError: out of paint"), ("dies", "exit code -9")]
)
def test_a_rank_that_fails_ends_all_of_them(how: str, said: str) -> None:
    began = time.monotonic()
    with pytest.raises(RankFailed, match=said) as failure:
        launch(3, _one_fails, how)
    assert time.monotonic() - began < 30
    assert "rank 1 failed" in str(failure.value) and "rank 2" not in str(failure.value)
    assert "GangBroken: rank 1 died or left" in str(failure.value)


def test_what_cannot_be_launched_is_refused_before_a_process_starts() -> None:
    with pytest.raises(ValueError, match="define the function at the top level of a module"):
        launch(1, lambda communicator: None)
    with pytest.raises(ValueError, match="at least one rank, not 0"):
        launch(0, _rank)
    with pytest.raises(ValueError, match="no backend moves meta tensors among 2 ranks"):
        launch(2, _rank, device="meta")
    gpus = torch.cuda.device_count()
    with pytest.raises(NotEnoughDevices, match=f"need {gpus + 1} GPUs; this machine has {gpus}"):
        launch(gpus + 1, _rank, device="cuda")


def _parent(rank: int, world_size: int) -> tuple[int, bool]:
    return os.getppid(), torch.cuda._is_in_bad_fork()


def test_processes_for_cuda_are_not_forked() -> None:
    """Forked after CUDA was initialized, a process cannot use it, and importing diffusers initializes it."""
    assert run_processes(1, _parent, device_type="cuda") == [(os.getpid(), False)]


def _stays(rank: int, world_size: int) -> Iterator[int]:
    yield os.getpid()
    time.sleep(600)


PARENT = """
import sys
from tests.distributed.ranks import Ranks
from tests.distributed.test_launch import _stays
with Ranks(2, _stays, device_type=sys.argv[1]) as ranks:
    print(*map(ranks.milestone, range(2)), flush=True)
    ranks.listen()
"""


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_ranks_end_with_the_program_that_is_killed(device_type: str) -> None:
    arguments = [sys.executable, "-c", PARENT, device_type]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        ranks = [psutil.Process(int(pid)) for pid in program.stdout.readline().split()]
        program.kill()
    _, left = psutil.wait_procs(ranks, timeout=60)
    for rank in left:
        rank.kill()
    assert len(ranks) == 2 and not left


def _on_the_gpu(communicator: Communicator) -> tuple[str, float]:
    return str(communicator.device), torch.arange(4.0, device=communicator.device).sum().item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_rank_computes_on_its_gpu() -> None:
    assert launch(1, _on_the_gpu, device="cuda") == [("cuda:0", 6.0)]
