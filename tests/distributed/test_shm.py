"""Shared memory among processes: the order of loads and stores, kills at any moment, walls between them."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch.distributed import FileStore

from distriray.collective import all_gather, connect, serve_store
from distriray.errors import BackendUnavailable
from tests.distributed.ranks import run_processes

pytestmark = pytest.mark.distributed

NEW_NETWORK = 0x40000000


def _torrent(rank: int, world_size: int, address: str, seconds: float) -> int:
    """Messages of which every word says whose and which it is, as fast as they go."""
    communicator = connect("shm", rank=rank, world_size=world_size, address=address)
    dice = random.Random(7)  # the same on all ranks
    rounds, ended = 0, torch.zeros(1, dtype=torch.bool)
    began = time.monotonic()
    while not ended:
        works, expected = [], []
        for index in range(dice.randint(1, 4)):
            length = dice.choice([1, 7, 100, 5_000, dice.randint(1, 200_000)])
            values = [1_000_000 * rounds + 100 * index + sender for sender in range(world_size)]
            tensors = [torch.full((length,), -1) for _ in range(world_size)]
            tensors[rank].fill_(values[rank])
            works.append(all_gather(communicator, tensors))
            expected.append((tensors, values))
        for work in reversed(works):
            work.wait()
        for tensors, values in expected:
            for tensor, value in zip(tensors, values, strict=True):
                assert tensor.eq(value).all(), (rounds, value, tensor[tensor != value])
        rounds += 1
        votes = [torch.zeros(1, dtype=torch.bool) for _ in range(world_size)]
        votes[rank].fill_(time.monotonic() - began > seconds)
        all_gather(communicator, votes).wait()
        ended = torch.stack(votes).any()
    communicator.close()
    return rounds


@pytest.mark.parametrize("world_size", [2, 4])
def test_no_byte_is_read_before_it_was_written(world_size: int) -> None:
    """On a processor that is to join `handover.PROCESSORS`, let this run for an hour first."""
    served = serve_store("127.0.0.1")
    seconds = float(os.environ.get("DISTRIRAY_TORRENT_S", "1.5"))
    rounds = run_processes(world_size, _torrent, served.address, seconds, timeout_s=seconds + 60)
    assert len(set(rounds)) == 1


def _exchange_forever(rank: int, address: str, name: str, connected: int) -> None:
    communicator = connect("shm", rank=rank, world_size=4, address=address, name=name)
    tensors = list(torch.zeros(4, 100_000))
    os.write(connected, b".")
    while True:
        all_gather(communicator, tensors).wait()


def _kill(rank: int, world_size: int, address: str, rounds: int) -> int:
    """Fork gangs of four and kill their ranks one by one, every second gang while it connects."""
    dice, kills = random.Random(3), 0
    for round_ in range(rounds):
        reading, writing = os.pipe()
        children = []
        for place in range(4):
            child = os.fork()
            if not child:
                with suppress(BaseException):
                    _exchange_forever(place, address, f"gang-{round_}", writing)
                time.sleep(60)  # whoever survives is killed, too
            children.append(child)
        if round_ % 2:
            os.read(reading, 1)
        for child in dice.sample(children, 4):
            time.sleep(dice.random() * dice.choice([0, 0.001, 0.01, 0.03]))
            os.kill(child, signal.SIGKILL)
            kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.close(reading)
        os.close(writing)
    return kills


def _left_behind() -> set[str]:
    """Memory in `/dev/shm` and names of sockets."""
    memory = {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}
    sockets = Path("/proc/net/unix").read_text().split()
    return memory | {name for name in sockets if "distriray-" in name}


def test_200_kills_while_ranks_connect_and_exchange_leave_nothing() -> None:
    served, before = serve_store("127.0.0.1"), _left_behind()
    assert run_processes(1, _kill, served.address, 50, timeout_s=120) == [200]
    deadline = time.monotonic() + 10  # others' files come and go
    while _left_behind() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _left_behind() - before


def _in_a_network_of_its_own(rank: int, world_size: int, path: str) -> str:
    if rank == 1 and ctypes.CDLL(None, use_errno=True).unshare(NEW_NETWORK):
        return "not allowed"
    with pytest.raises(BackendUnavailable) as raised:
        connect("shm", rank=rank, world_size=world_size, store=FileStore(path, world_size), timeout_s=5)
    return str(raised.value)


def test_containers_with_networks_of_their_own_are_told_apart(tmp_path: Path) -> None:
    try:
        told = run_processes(2, _in_a_network_of_its_own, str(tmp_path / "store"))
    except RuntimeError as error:
        if "did not join" not in str(error):
            raise
        pytest.skip("making a network namespace needs a right that this user lacks")
    assert (
        told == ["gang 'gang' cannot share memory: ranks [1] have another network namespace than rank 0"] * 2
    )
