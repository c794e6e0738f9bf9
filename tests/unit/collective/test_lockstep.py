"""Ranks that take turns in one process."""

from __future__ import annotations

import pytest
import torch

from distriray.collective import (
    Communicator,
    LockstepCommunicator,
    all_gather,
    connect,
    run_in_lockstep,
)
from distriray.errors import GangBroken


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


def test_a_gang_is_over_when_its_ranks_have_returned() -> None:
    communicators = run_in_lockstep(2, lambda communicator: communicator)
    for communicator in communicators:
        assert communicator.broken
        with pytest.raises(GangBroken, match="its ranks have returned"):
            communicator.check()


def test_ranks_that_wait_for_each_other_in_vain_are_told_so() -> None:
    def rank(communicator: LockstepCommunicator) -> None:
        if communicator.rank == 2:
            return  # ends without a message for anybody
        peer = 1 - communicator.rank
        ours, theirs = torch.zeros(1), torch.zeros(1)
        work = communicator.exchange({}, {2: torch.empty(1)})
        communicator.exchange({peer: ours}, {peer: theirs}).wait()
        communicator.check()
        work.wait()

    with pytest.raises(
        GangBroken, match=r"rank . did not get .*: ranks \[0, 1\] wait for messages that no rank"
    ):
        run_in_lockstep(3, rank)


@pytest.mark.parametrize("late", [0, 1])
def test_a_message_of_another_size_than_expected_breaks_the_gang_for_both(late: int) -> None:
    """As between processes, whichever rank says first what it sends or expects."""
    ended = []

    def rank(communicator: LockstepCommunicator) -> None:
        if communicator.rank == late:
            communicator.exchange({}, {2: torch.empty(1)}).wait()
        if communicator.rank == 2:
            communicator.exchange({late: torch.zeros(1)}, {}).wait()
            return
        try:
            if communicator.rank == 0:
                communicator.exchange({1: torch.zeros(100)}, {}).wait()
            else:
                communicator.exchange({}, {0: torch.empty(50)}).wait()
        except GangBroken as error:
            ended.append(str(error))
            raise

    with pytest.raises(GangBroken, match="rank 0 sent 400 bytes where 200 were expected"):
        run_in_lockstep(3, rank)
    assert len(ended) == 2 and all("400 bytes where 200" in said for said in ended)


def test_a_rank_of_the_gang_knows_its_peers_and_checks_it() -> None:
    def rank(communicator: LockstepCommunicator) -> tuple[int, ...]:
        assert isinstance(communicator, Communicator)
        communicator.check()
        tensors = [torch.full((1,), float(communicator.rank)) for _ in range(3)]
        all_gather(communicator, tensors).wait()
        assert [tensor.item() for tensor in tensors] == [0, 1, 2]
        if communicator.rank == 0:
            communicator.abort()
        with pytest.raises(GangBroken, match="rank 0 aborted the gang"):
            while True:
                communicator.check()
                communicator.exchange({}, {(communicator.rank + 1) % 3: torch.empty(1)}).wait()
        return communicator.peers

    assert run_in_lockstep(3, rank) == [(1, 2), (0, 2), (0, 1)]
    with pytest.raises(ValueError, match="at least one rank, not 0"):
        run_in_lockstep(0, rank)


def test_the_device_has_its_index_like_the_tensors_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert run_in_lockstep(2, lambda communicator: str(communicator.device), "cuda") == ["cuda:3", "cuda:3"]
    assert str(connect("local", device="cuda").device) == "cuda:3"


@pytest.mark.parametrize("kind", [RuntimeError, pytest.fail.Exception, KeyboardInterrupt])
def test_a_rank_that_fails_ends_the_others(kind: type[BaseException]) -> None:
    """Whatever it fails with, so that `pytest.raises` within a rank fails its test."""
    ended = []

    def rank(communicator: LockstepCommunicator) -> None:
        if communicator.rank == 1:
            raise kind("out of paint")
        try:
            communicator.exchange({}, {1: torch.empty(1)}).wait()
        except GangBroken:
            ended.append(communicator.rank)
            raise

    with pytest.raises(kind, match="out of paint"):
        run_in_lockstep(3, rank)
    assert sorted(ended) == [0, 2]
