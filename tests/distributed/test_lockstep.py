"""A gang that takes turns in one process makes the pictures of separate processes."""

from __future__ import annotations

import pytest
import torch

from bench.lockstep import LockstepCommunicator, run_in_lockstep
from bench.ranks import run_ranks
from distriray import ParallelConfig, parallelize
from distriray.errors import GangBroken
from tests.distributed.cases import Case, call, together
from tests.models import tiny_sdxl

CASES = [
    Case(images=2, config={"warmup_steps": 2, "cfg_parallel": False, "prediction": {"halos": 0.5}}),
    Case(images=2, config={"warmup_steps": 1, "cfg_parallel": False, "group_norm": "corrected"}),
    Case(height=136, config={"exchange": "sync", "cfg_parallel": False}),
    Case(config={"exchange": "none", "cfg_parallel": False}),
]
SPLIT = Case(config={"warmup_steps": 1, "cfg_parallel": True})


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [3, 4])
def test_latents_are_those_of_separate_processes_bit_for_bit(ranks: int) -> None:
    cases = [*CASES, SPLIT] if ranks % 2 == 0 else CASES
    pipelines = [tiny_sdxl() for _ in range(ranks)]

    def rank(communicator: LockstepCommunicator) -> list[torch.Tensor]:
        pipeline = pipelines[communicator.rank]
        return [
            call(parallelize(pipeline, communicator, ParallelConfig(**case.config)), case) for case in cases
        ]

    turns = run_in_lockstep(ranks, rank)
    apart = run_ranks(ranks, together, cases)
    for here, there in zip(turns, apart, strict=True):
        for case, ours, theirs in zip(cases, here, there, strict=True):
            assert torch.equal(ours, theirs.latents), case


def test_messages_keep_their_order_whoever_comes_first() -> None:
    def rank(communicator: LockstepCommunicator) -> list[float]:
        peer = 1 - communicator.rank
        works, received = [], [torch.empty(1) for _ in range(3)]
        for index, into in enumerate(received):
            own = torch.tensor([10.0 * communicator.rank + index])
            works.append(communicator.exchange({peer: own}, {peer: into}))
        for work in reversed(works):
            work.wait()
        return [float(value) for value in received]

    assert run_in_lockstep(2, rank) == [[10, 11, 12], [0, 1, 2]]


def test_a_rank_that_fails_ends_the_others() -> None:
    ended = []

    def rank(communicator: LockstepCommunicator) -> None:
        if communicator.rank == 1:
            raise RuntimeError("out of paint")
        try:
            communicator.exchange({}, {1: torch.empty(1)}).wait()
        except GangBroken:
            ended.append(communicator.rank)
            raise

    with pytest.raises(RuntimeError, match="out of paint"):
        run_in_lockstep(3, rank)
    assert sorted(ended) == [0, 2]
