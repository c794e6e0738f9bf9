"""Gangs that share memory, all of their ranks in one process."""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from distriray.collective import Communicator, all_gather, connect, handover, ring, shm
from distriray.errors import BackendUnavailable, GangBroken

_names = count()


class Gang:
    """Ranks that each have a thread."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._threads = ThreadPoolExecutor(world_size)
        self.ranks: list[Communicator] = []

    def each(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(communicator, ...)` returns on each rank."""
        works = [self._threads.submit(function, rank, *arguments) for rank in self.ranks]
        return [work.result(30) for work in works]

    def join(self, backend: str | None = "shm", timeout_s: float = 10.0) -> list[Communicator]:
        store, name = HashStore(), f"gang-{next(_names)}"

        def one(rank: int) -> Communicator:
            return connect(
                backend,
                rank=rank,
                world_size=self.world_size,
                store=store,
                timeout_s=timeout_s,
                name=name,
            )

        works = [self._threads.submit(one, rank) for rank in range(self.world_size)]
        failures = [work.exception(30) for work in works]
        for failure in failures:
            if failure is not None:
                raise ExceptionGroup("joining", [failure for failure in failures if failure])
        self.ranks = [work.result() for work in works]
        return self.ranks

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()
        self.ranks = []
        self._threads.shutdown()


@pytest.fixture
def make() -> Iterator[Callable[[int], Gang]]:
    gangs: list[Gang] = []

    def make(world_size: int = 2) -> Gang:
        gangs.append(Gang(world_size))
        return gangs[-1]

    yield make
    for gang in gangs:
        gang.close()


@pytest.fixture
def pair(make: Callable[[int], Gang]) -> Gang:
    gang = make(2)
    gang.join()
    return gang


@pytest.fixture
def small_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "SMALLEST", 1 << 12)
    monkeypatch.setattr(ring, "LARGEST", 1 << 14)


def numbers(length: int, sender: int) -> torch.Tensor:
    return torch.arange(length) * 10 + sender


def failure_of(verb: Callable[[], Any]) -> tuple[str, float]:
    start = time.monotonic()
    with pytest.raises(GangBroken) as raised:
        verb()
    return str(raised.value), time.monotonic() - start


# ------------------------------------------------------------------------------------------ what arrives


@pytest.mark.usefixtures("small_rings")
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_that_all_send_more_than_fits_do_not_wait_for_each_other(
    make: Callable[[int], Gang], world_size: int
) -> None:
    """Far more than a ring's room goes both ways between all pairs; works are waited for backwards."""
    gang = make(world_size)
    gang.join()

    def rank(communicator: Communicator) -> None:
        gathered = [[torch.zeros(20_000, dtype=torch.int64) for _ in range(world_size)] for _ in range(4)]
        for index, tensors in enumerate(gathered):
            tensors[communicator.rank] = numbers(20_000, 100 * index + communicator.rank)
        works = [all_gather(communicator, tensors) for tensors in gathered]
        for work in reversed(works):
            work.wait()
        for index, tensors in enumerate(gathered):
            for sender, tensor in enumerate(tensors):
                assert torch.equal(tensor, numbers(20_000, 100 * index + sender))

    gang.each(rank)


@pytest.mark.usefixtures("small_rings")
def test_a_send_that_does_not_fit_goes_on_while_its_rank_waits_for_something_else(pair: Gang) -> None:
    first, second = pair.ranks
    large, small = numbers(20_000, 0), torch.zeros(1)
    sending = first.exchange({1: large}, {})  # returns, though nobody reads
    received = torch.zeros_like(large)

    def answer(communicator: Communicator) -> None:
        communicator.exchange({}, {0: received}).wait()
        communicator.exchange({0: torch.ones(1)}, {}).wait()

    answering = threading.Thread(target=answer, args=(second,))
    answering.start()
    first.exchange({}, {1: small}).wait()
    answering.join(10)
    assert small.item() == 1 and torch.equal(received, large)
    sending.wait()


@pytest.mark.usefixtures("small_rings")
def test_a_wait_for_a_send_lasts_until_its_tensor_may_be_overwritten(pair: Gang) -> None:
    large, received = numbers(20_000, 0), torch.zeros(20_000, dtype=torch.int64)

    def rank(communicator: Communicator) -> None:
        if communicator.rank == 0:
            communicator.exchange({1: large}, {}).wait()
            large.zero_()
        else:
            work = communicator.exchange({}, {0: received})
            time.sleep(0.05)
            work.wait()

    pair.each(rank)
    assert torch.equal(received, numbers(20_000, 0))


def test_works_that_nobody_waits_for_keep_their_place(pair: Gang) -> None:
    first, second = pair.ranks
    for index in range(3):
        first.exchange({1: torch.full((5,), float(index))}, {}).wait()
    dropped = torch.zeros(5)
    second.exchange({}, {0: dropped})
    second.exchange({}, {0: torch.zeros(5)})
    last = torch.zeros(5)
    second.exchange({}, {0: last}).wait()
    assert dropped.eq(0).all() and last.eq(2).all()


def test_tensors_of_inference_mode_can_be_received_outside_of_it(pair: Gang) -> None:
    with torch.inference_mode():
        received = torch.zeros(3)
    work = pair.ranks[1].exchange({}, {0: received})
    pair.ranks[0].exchange({1: torch.ones(3)}, {}).wait()
    work.wait()
    assert received.eq(1).all()


def test_what_was_sent_before_a_rank_left_still_arrives(make: Callable[[int], Gang]) -> None:
    """Others are not disturbed by it either, until they need the one that left."""
    gang = make(3)
    first, second, third = gang.join()
    first.exchange({1: torch.full((9,), 7.0)}, {}).wait()
    first.close()
    received = torch.zeros(9)
    second.exchange({}, {0: received}).wait()
    assert received.eq(7).all()
    third.exchange({1: received}, {}).wait()
    second.exchange({}, {2: received}).wait()
    assert not second.broken
    closed = "the communicator was closed on rank 0"
    said = f"rank 0 died or left (receiving from it): {closed}"
    assert failure_of(second.exchange({}, {0: received}).wait)[0] == said
    said = f"rank 0 died or left (sending to it): {closed}"
    assert failure_of(lambda: third.exchange({0: received}, {}))[0] == said


def test_who_left_because_of_another_says_so(make: Callable[[int], Gang]) -> None:
    first, second, third = make(3).join()
    first.abort()
    because = failure_of(second.exchange({}, {0: torch.zeros(1)}).wait)[0]
    assert because.endswith("aborted on rank 0")
    said = failure_of(third.exchange({}, {1: torch.zeros(1)}).wait)[0]
    assert said == f"rank 1 died or left (receiving from it): {because}"


def test_whoever_leaves_after_its_peer_gets_no_signal(pair: Gang) -> None:
    """A program may have it end the process, as those do that print into a pipe."""
    signals: list[int] = []
    former = signal.signal(signal.SIGPIPE, lambda number, _: signals.append(number))
    try:
        pair.ranks[0].close()
        failure_of(pair.ranks[1].exchange({}, {0: torch.zeros(1)}).wait)
    finally:
        signal.signal(signal.SIGPIPE, former)
    assert not signals


# ---------------------------------------------------------------------------------------------- failure


def test_a_message_of_another_size_breaks_the_gang(pair: Gang) -> None:
    first, second = pair.ranks
    first.exchange({1: torch.ones(100)}, {}).wait()
    received = torch.zeros(50)
    said = "rank 0 sent 400 bytes where 200 were expected"
    assert failure_of(lambda: second.exchange({}, {0: received}).wait())[0] == said
    assert second.broken and not received.any()
    assert "rank 1 died or left" in failure_of(first.exchange({}, {1: received}).wait)[0]


@pytest.mark.usefixtures("small_rings")
def test_a_peer_that_does_not_answer_is_named_at_the_timeout(make: Callable[[int], Gang]) -> None:
    gang = make(2)

    def impatient() -> list[Communicator]:
        """The first would wait 0.3 s, once they have joined, which a busy machine may take longer for."""
        first, second = gang.join(timeout_s=10.0)
        assert isinstance(first, shm.ShmCommunicator) and first.timeout_s == 10.0
        first.timeout_s = 0.3
        return [first, second]

    first, second = impatient()
    late = failure_of(first.exchange({}, {1: torch.zeros(1)}).wait)
    assert late[0] == "rank 1 did not answer within 0.3 s (receiving from it)" and 0.25 < late[1] < 2
    assert "rank 0 died or left" in failure_of(second.exchange({}, {0: torch.zeros(1)}).wait)[0]
    first, second = impatient()
    late = failure_of(first.exchange({1: torch.zeros(100_000)}, {}).wait)
    assert late[0] == "rank 1 did not answer within 0.3 s (sending to it)"


def test_an_abort_wakes_who_waits_here_and_there(pair: Gang) -> None:
    first = pair.ranks[0]
    threading.Timer(0.3, first.abort).start()

    def wait(communicator: Communicator) -> tuple[str, float]:
        other = 1 - communicator.rank
        return failure_of(communicator.exchange({}, {other: torch.zeros(1)}).wait)

    (here, here_s), (there, there_s) = pair.each(wait)
    assert here == "the communicator was aborted on rank 0" and here_s < 1
    assert there == f"rank 0 died or left (receiving from it): {here}" and there_s < 1


def test_an_interrupt_in_mid_copy_breaks_the_gang(pair: Gang, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was copied is not known then, and a second try could send bytes twice."""

    def interrupted(*_: Any) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ring.Writer, "push", interrupted)
        pair.ranks[0].exchange({1: torch.ones(1)}, {})
    assert "interrupted" in failure_of(pair.ranks[0].check)[0]


def test_peers_that_do_not_come_are_named() -> None:
    with pytest.raises(GangBroken, match=r"ranks \[1, 2\] of gang 'few' did not join within 0.2 s"):
        connect("shm", rank=0, world_size=3, store=HashStore(), timeout_s=0.2, name="few")


# ----------------------------------------------------------------------------------------------- memory


def test_the_memory_has_no_name_and_goes_with_the_communicator(make: Callable[[int], Gang]) -> None:
    def held() -> tuple[int, set[str]]:
        gc.collect()
        with open("/proc/self/maps") as maps:
            shared = {line for line in maps if "/memfd:distriray" in line}
        return len(os.listdir("/proc/self/fd")), shared

    gang = make(3)
    gang.each(id)
    files, others = held()  # another test may have left some
    named = set(os.listdir("/dev/shm"))
    ranks = gang.join()
    for rank in ranks:
        rank.exchange(dict.fromkeys(rank.peers, torch.ones(1 << 20)), {})
    shared = held()[1] - others
    assert len(shared) == 6 and all("(deleted)" in line for line in shared)
    assert not {name for name in os.listdir("/dev/shm") if "distriray" in name} - named
    gang.ranks = []
    for rank in ranks:
        rank.close()
    assert held() == (files, others)


def test_memory_is_for_this_user_and_its_size_cannot_be_changed() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        memory = handover._give(ours, 1 << 20)
        _, (descriptor,), _, _ = socket.recv_fds(theirs, 1, 1)
    assert os.fstat(descriptor).st_mode & 0o777 == 0o600
    for size in (0, 2 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    os.close(descriptor)
    memory.close()


def test_strangers_at_the_door_are_sent_away(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[int], Gang]
) -> None:
    """They see the sockets' names in `/proc/net/unix`, but no key."""
    strangers: list[socket.socket] = []
    gather = shm._Board.gather

    def visited(self: Any, what: str, text: str) -> list[str]:
        texts = gather(self, what, text)
        if what == "card" and self._rank == 1:
            for shown in (b"", b"\0" * 20):
                stranger = socket.socket(socket.AF_UNIX)
                stranger.connect(f"\0{handover.Card.parse(texts[0]).door}")
                stranger.sendall(shown)
                strangers.append(stranger)
        return texts

    monkeypatch.setattr(shm._Board, "gather", visited)
    monkeypatch.setattr(handover, "PATIENCE_S", 0.1)
    first, second = make(2).join()
    first.exchange({1: torch.ones(1)}, {}).wait()
    received = torch.zeros(1)
    second.exchange({}, {0: received}).wait()
    assert received.item() == 1
    for stranger in strangers:
        stranger.settimeout(5)
        with suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
        stranger.close()


# -------------------------------------------------------------------------------------- where it cannot be


def elsewhere(what: str) -> Callable[[], dict[str, str]]:
    """Whereabouts that are different for every rank that asks, in this one thing."""
    real, numbers = handover._whereabouts, count()
    return lambda: {**real(), what: f"another-{next(numbers)}"}


def unwilling(*_: Any) -> int:
    raise PermissionError(1, "Operation not permitted")


def obstruct(monkeypatch: pytest.MonkeyPatch, obstacle: str) -> None:
    if obstacle in ("machine", "network namespace", "user namespace", "user"):
        monkeypatch.setattr(handover, "_whereabouts", elsewhere(obstacle))
    elif obstacle == "memory":
        monkeypatch.setattr(os, "memfd_create", unwilling)
    elif obstacle == "connection":
        knock = handover._knock
        monkeypatch.setattr(
            handover, "_knock", lambda rank, *rest: unwilling() if rank == 2 else knock(rank, *rest)
        )
    elif obstacle == "processor":
        monkeypatch.setattr(handover.platform, "machine", lambda: "aarch64")
    else:
        monkeypatch.setattr(handover.sys, "platform", "darwin")


OBSTACLES = {
    "machine": r"ranks \[.*\] have another machine than rank 0",
    "network namespace": r"ranks \[.*\] have another network namespace than rank 0",
    "user namespace": r"ranks \[.*\] have another user namespace than rank 0",
    "user": r"ranks \[.*\] have another user than rank 0",
    "memory": r"rank . could not share memory with its peers \(.*",
    "connection": r"rank 2 could not share memory with its peers \(.* not permitted",
    "processor": "rank 0 runs on a processor aarch64; shared memory was tested on x86_64 only",
    "system": "rank 0 runs on .*; memory is handed over on Linux only",
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_ranks_that_cannot_share_memory_all_use_gloo_and_say_why(
    obstacle: str,
    make: Callable[[int], Gang],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gang = make(3)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        obstruct(patch, obstacle)
        ranks = gang.join(None)
    assert [rank.backend for rank in ranks] == ["gloo"] * 3
    [said] = caplog.records
    assert said.getMessage().endswith("; it uses 'gloo'")
    received = torch.zeros(1)
    sending = ranks[0].exchange({1: torch.ones(1)}, {})
    ranks[1].exchange({}, {0: received}).wait()
    sending.wait()
    assert received.item() == 1


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_shared_memory_that_was_asked_for_and_cannot_be_is_an_error_on_every_rank(
    obstacle: str, make: Callable[[int], Gang], monkeypatch: pytest.MonkeyPatch
) -> None:
    gang = make(3)
    obstruct(monkeypatch, obstacle)
    with pytest.raises(ExceptionGroup) as raised:
        gang.join("shm")
    failures = raised.value.exceptions
    assert len(failures) == 3 and all(isinstance(failure, BackendUnavailable) for failure in failures)
    assert len({str(failure) for failure in failures}) == 1
    assert failures[0].args[0].startswith("gang 'gang-")
    assert re.search(OBSTACLES[obstacle], str(failures[0]))


def test_ranks_of_one_machine_share_memory_unless_told_otherwise(make: Callable[[int], Gang]) -> None:
    assert [rank.backend for rank in make(2).join(None)] == ["shm"] * 2
    assert [rank.backend for rank in make(2).join("gloo")] == ["gloo"] * 2
