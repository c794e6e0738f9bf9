"""What every communicator promises, asked of each backend with real processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from importlib.util import find_spec
from itertools import count
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from distriray.collective import BACKENDS, Communicator, all_gather, connect
from distriray.collective.lifeline import Lifeline
from distriray.errors import GangBroken, GangMismatch
from tests.distributed.gpus import gpu_of
from tests.distributed.ranks import Ranks, free_address, run_processes

pytestmark = pytest.mark.distributed

DTYPES = [
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.bool, torch.uint8),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64),
]
HAS_CUPY = find_spec("cupy") is not None
HAS_GPU = torch.cuda.is_available() and HAS_CUPY
ON_GPUS = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU and CuPy")]
_names = count()


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """The address of a store that outlives every rank."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield f"127.0.0.1:{store.port}"


@pytest.fixture
def gang(served: str) -> dict[str, Any]:
    return {"address": served, "name": f"gang-{next(_names)}", "timeout_s": 20.0}


def device_type(backend: str) -> str:
    return BACKENDS[backend].device or "cpu"


def size(backend: str) -> int:
    if BACKENDS[backend].alone:
        return 1
    return 3 if device_type(backend) == "cpu" else max(2, min(torch.cuda.device_count(), 4))


def backends(*devices: str, alone: bool = False) -> Any:
    """Cases of the backends for tensors of such devices, those for gangs of one too if `alone`."""
    names = [name for name, each in BACKENDS.items() if device_type(name) in devices and alone >= each.alone]
    marks = {name: ON_GPUS if device_type(name) == "cuda" else [] for name in names}
    return pytest.mark.parametrize("backend", [pytest.param(name, marks=marks[name]) for name in names])


every_backend = backends("cpu", "cuda", alone=True)
with_peers = backends("cpu", "cuda")
on_the_cpu = backends("cpu")


def join(backend: str, rank: int, world_size: int, gang: dict[str, Any], **changes: Any) -> Communicator:
    device = gpu_of(rank, world_size) if device_type(backend) == "cuda" else "cpu"
    return connect(backend, rank=rank, world_size=world_size, device=device, **{**gang, **changes})


def failure_of(verb: Any) -> tuple[str, float]:
    """The message of the `GangBroken` that `verb()` ends with, and after how many seconds."""
    start = time.monotonic()
    try:
        verb()
    except GangBroken as error:
        return str(error), time.monotonic() - start
    raise AssertionError("it did not fail")


def pattern(sender: int, receiver: int, index: int, length: int, **like: Any) -> torch.Tensor:
    return torch.arange(length, **like) + 1000 * index + 100 * sender + 10 * receiver


# ------------------------------------------------------------------------------------------ what arrives


def _many_in_flight(rank: int, world_size: int, backend: str, gang: dict[str, Any]) -> None:
    communicator = join(backend, rank, world_size, gang)
    assert isinstance(communicator, Communicator)
    assert (communicator.rank, communicator.world_size, communicator.broken) == (rank, world_size, False)
    assert communicator.peers == tuple(peer for peer in range(world_size) if peer != rank)
    communicator.check()
    like = {"dtype": torch.int64, "device": communicator.device}
    works, received, nbytes = [], [], 0
    for index in range(60):
        lengths = {peer: 1 + (7 * index + 3 * rank + 5 * peer) % 50 for peer in communicator.peers}
        sends = {peer: pattern(rank, peer, index, length, **like) for peer, length in lengths.items()}
        coming = {peer: 1 + (7 * index + 3 * peer + 5 * rank) % 50 for peer in communicator.peers}
        receives = {peer: torch.zeros(length, **like) for peer, length in coming.items()}
        works.append(communicator.exchange(sends, receives))
        received.append(receives)
        nbytes += sum(8 * length for length in lengths.values())
    for work in reversed(works):
        work.wait()
        work.wait()  # waiting again changes nothing
    for index, receives in enumerate(received):
        for peer, tensor in receives.items():
            assert torch.equal(tensor, pattern(peer, rank, index, len(tensor), **like)), (index, peer)
    assert communicator.bytes_sent == nbytes
    communicator.close()
    communicator.close()
    assert communicator.broken


@every_backend
def test_many_messages_of_different_sizes_arrive_in_order_and_are_counted(backend: str, gang) -> None:
    run_processes(size(backend), _many_in_flight, backend, gang, device_type=device_type(backend))


def _all_dtypes(rank: int, world_size: int, backend: str, gang: dict[str, Any]) -> None:
    communicator = join(backend, rank, world_size, gang)
    device = communicator.device
    for dtype in DTYPES:
        for shape in [(), (3, 5), (2, 0, 4), (1,)]:
            values = torch.arange(torch.Size(shape).numel(), device=device).reshape(shape)
            tensors = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(world_size)]
            tensors[rank] = (values + rank).to(dtype)
            all_gather(communicator, tensors).wait()
            for sender, tensor in enumerate(tensors):
                assert torch.equal(tensor, (values + sender).to(dtype)), (dtype, shape)


@every_backend
def test_every_dtype_and_shape_arrives_bit_by_bit(backend: str, gang) -> None:
    run_processes(size(backend), _all_dtypes, backend, gang, device_type=device_type(backend))


def _one_way_and_empty(rank: int, world_size: int, backend: str, gang: dict[str, Any]) -> None:
    communicator = join(backend, rank, world_size, gang)
    device = communicator.device
    communicator.exchange({}, {}).wait()
    empty = torch.empty(0, 4, device=device)
    communicator.exchange(dict.fromkeys(communicator.peers, empty), {}).wait()  # nobody expects it either
    assert communicator.bytes_sent == 0
    if world_size == 1:
        return
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    big = torch.full((2_000_000,), float(rank), device=device)
    taken = torch.empty_like(big)
    work = communicator.exchange({right: big}, {left: taken})
    after = communicator.exchange({right: empty}, {left: empty})
    work.wait()
    big.fill_(-1)  # a sent tensor may be overwritten once the work was waited for
    after.wait()
    assert taken.eq(left).all()
    assert communicator.bytes_sent == 8_000_000


@every_backend
def test_transfers_may_be_one_way_large_or_empty(backend: str, gang) -> None:
    run_processes(size(backend), _one_way_and_empty, backend, gang, device_type=device_type(backend))


# ------------------------------------------------------------------------- sub-groups and several gangs


def _views(rank: int, world_size: int, backend: str, gang: dict[str, Any]) -> None:
    communicator = join(backend, rank, world_size, gang)
    backwards = communicator.subgroup(list(reversed(range(world_size))))
    assert isinstance(backwards, Communicator)
    assert (backwards.rank, backwards.world_size) == (world_size - 1 - rank, world_size)
    assert backwards.peers == tuple(peer for peer in range(world_size) if peer != world_size - 1 - rank)
    views = [communicator, backwards, backwards.subgroup(range(world_size))]
    names = [range(world_size), range(world_size)[::-1], range(world_size)[::-1]]
    if rank < 2 <= world_size:
        views.append(communicator.subgroup([1, 0]))
        names.append(range(2)[::-1])
    works, expected = [], []
    for index in range(12):  # interleaved, all in flight: a view shares its parent's order
        for view, ranks in zip(views[index % 2 :], names[index % 2 :], strict=True):
            receives = {peer: torch.zeros(4, device=view.device) for peer in view.peers}
            sends = {
                peer: torch.full((4,), 100.0 * index + 10 * rank + ranks[peer], device=view.device)
                for peer in view.peers
            }
            works.append(view.exchange(sends, receives))
            expected += [
                (tensor, 100.0 * index + 10 * ranks[peer] + rank) for peer, tensor in receives.items()
            ]
    for work in works:
        work.wait()
    for tensor, value in expected:
        assert tensor.eq(value).all()
    alone = communicator.subgroup([rank])
    alone.exchange({}, {}).wait()
    assert alone.bytes_sent == communicator.bytes_sent
    alone.close()
    assert not communicator.broken
    for ranks in (
        [],
        [rank, rank],
        [rank, world_size],
        [other for other in range(world_size) if other != rank],
    ):
        with pytest.raises(ValueError):
            communicator.subgroup(ranks)
    with pytest.raises(ValueError):
        alone.exchange({1: torch.zeros(1)}, {})
    communicator.exchange({}, {}).wait()
    if world_size > 1:  # nobody breaks the parent while others still use it
        tensors = list(torch.zeros(world_size, 1, device=communicator.device))
        all_gather(communicator, tensors).wait()
        assert not any(tensor.item() for tensor in tensors)  # on a GPU waiting does not wait, reading does
    alone.abort()
    assert communicator.broken and backwards.broken


@every_backend
def test_subgroups_are_views_that_mix_with_their_parent(backend: str, gang) -> None:
    run_processes(size(backend), _views, backend, gang, device_type=device_type(backend))


def _crossed(rank: int, world_size: int, backend: str, gang: dict[str, Any]) -> None:
    members = {"all": [0, 1, 2], "ends": [2, 0], "upper": [1, 2], "lower": [1, 0]}
    mine: dict[str, Communicator] = {}
    for name, ranks in members.items():
        if rank in ranks:
            own = {**gang, "name": f"{gang['name']}/{name}"}
            mine[name] = join(backend, ranks.index(rank), len(ranks), own)
    works, expected = [], []
    for index in range(5):
        # each process starts its gangs in another order: separate communicators owe each other none
        for name in sorted(mine, reverse=rank == 1):
            communicator, ranks = mine[name], members[name]
            value = 100.0 * index + len(name)
            receives = {peer: torch.zeros(3) for peer in communicator.peers}
            sends = {peer: torch.full((3,), value + 10 * rank) for peer in communicator.peers}
            works.append(communicator.exchange(sends, receives))
            expected += [(tensor, value + 10 * ranks[peer]) for peer, tensor in receives.items()]
    for work in works:
        work.wait()
    for tensor, value in expected:
        assert tensor.eq(value).all()
    held = [len(os.listdir(f"/proc/self/{kind}")) for kind in ("task", "fd")]
    for communicator in mine.values():
        communicator.close()
    left = [len(os.listdir(f"/proc/self/{kind}")) for kind in ("task", "fd")]
    assert left[1] < held[1] and (left[0] < held[0] or backend == "shm")  # which has no threads


@on_the_cpu
def test_one_process_belongs_to_several_gangs_under_different_ranks(backend: str, gang) -> None:
    run_processes(3, _crossed, backend, gang)


# ---------------------------------------------------------------------------------------------- failure


def _aborted(rank: int, world_size: int, backend: str, gang: dict[str, Any]) -> tuple[str, float]:
    communicator = join(backend, rank, world_size, gang)
    never = {peer: torch.zeros(1, device=communicator.device) for peer in communicator.peers}
    work = communicator.exchange({}, never)
    if rank == 0:
        threading.Timer(0.5, communicator.abort).start()

    def wait() -> None:
        work.wait()
        while backend == "nccl" and not communicator.broken:  # its waits do not block the host
            time.sleep(0.01)
        work.wait()

    failure = failure_of(wait)
    assert communicator.broken
    for verb in (work.wait, lambda: communicator.exchange({}, {}), lambda: communicator.exchange({}, never)):
        assert failure_of(verb)[1] < 0.1
    whole = communicator.subgroup(range(world_size))
    assert failure_of(communicator.check)[0] == failure_of(whole.check)[0]
    communicator.abort()
    communicator.close()
    return failure


@with_peers
def test_abort_wakes_the_waiting_thread_and_the_peers(backend: str, gang) -> None:
    first, *rest = run_processes(size(backend), _aborted, backend, gang, device_type=device_type(backend))
    assert "aborted" in first[0] and 0.4 < first[1] < 1.5
    for message, seconds in rest:
        assert ("rank 0 " in message or backend == "nccl") and seconds < 2.5


def _exchanging(rank: int, world_size: int, backend: str, gang: dict[str, Any]) -> Any:
    """Exchange until it fails; then the survivors, renamed, meet in a new gang."""
    communicator = join(backend, rank, world_size, gang)
    tokens = [torch.full((world_size, 50_000), float(rank), device=communicator.device) for _ in range(2)]

    def forever() -> None:
        while True:
            works = [all_gather(communicator, list(rows)) for rows in tokens]
            for work in works:
                work.wait()
            time.sleep(0.005)

    yield "connected"
    message, _ = failure_of(forever)
    assert communicator.broken
    yield time.monotonic(), message
    survivors = list(range(world_size - 1))
    again = join(
        backend,
        survivors.index(rank),
        len(survivors),
        {**gang, "name": gang["name"] + "/next", "timeout_s": 20},
    )
    heard = list(torch.full((again.world_size, 1), float(again.rank), device=again.device))
    all_gather(again, heard).wait()
    communicator.close()
    assert all(tensor.item() == sender for sender, tensor in enumerate(heard))
    again.close()
    return True


@with_peers
@pytest.mark.parametrize("end", ["kill", "stop"])
def test_survivors_of_a_dead_or_hung_peer_notice_and_meet_again(backend: str, end: str, gang) -> None:
    world_size = max(size(backend), 3)
    bound_s = 5.0 if end == "kill" else 2.0 + 1.5
    gang["timeout_s"] = 20.0 if end == "kill" else 2.0
    with Ranks(world_size, _exchanging, backend, gang, device_type=device_type(backend)) as ranks:
        for rank in range(world_size):
            assert ranks.milestone(rank) == "connected"
        time.sleep(0.2)
        lost, survivors = world_size - 1, list(range(world_size - 1))
        ended = time.monotonic()
        (ranks.kill if end == "kill" else ranks.stop)(lost)
        failures = [ranks.milestone(rank) for rank in survivors]
        for noticed, _ in failures:
            assert noticed - ended < bound_s
        assert any(re.search(rf"ranks? .*{lost}", message) for _, message in failures), failures
        outcomes = ranks.join(ranks=survivors)
        assert all(outcome.value is True for outcome in outcomes), outcomes


def _served_by_rank_0(rank: int, world_size: int, backend: str, gang: dict[str, Any]) -> Any:
    communicator = join(backend, rank, world_size, gang)
    yield "connected"
    received = {peer: torch.zeros(1) for peer in communicator.peers}
    return failure_of(communicator.exchange({}, received).wait)


@on_the_cpu
def test_the_death_of_the_rank_that_serves_the_store_is_noticed_too(backend: str) -> None:
    gang = {"address": free_address(), "timeout_s": 20.0}
    with Ranks(3, _served_by_rank_0, backend, gang) as ranks:
        for rank in range(3):
            ranks.milestone(rank)
        ranks.kill(0)
        failures = []
        for outcome in ranks.join(ranks=[1, 2]):
            assert outcome.value is not None, outcome.error
            failures.append(outcome.value)
        # Who notices first leaves, which the other may see before the death.
        assert all("died or left" in message and seconds < 5 for message, seconds in failures), failures
        assert any("rank 0 died or left" in message for message, _ in failures), failures


def _generations(rank: int, world_size: int, backend: str, gang: dict[str, Any]) -> None:
    """The last message is not lost when its sender leaves at once; the same address serves generations."""
    old = None
    for generation in range(15):
        communicator = join(backend, rank, world_size, {**gang, "name": f"generation-{generation}"})
        if old is not None:
            old.close()
        if rank == 0:
            communicator.exchange({1: torch.full((30_000,), 7.0)}, {}).wait()
        else:
            received = torch.zeros(30_000)
            time.sleep(0.002)
            communicator.exchange({}, {0: received}).wait()
            assert received.eq(7).all()
        old = communicator
        if generation % 2:
            communicator.abort()


@on_the_cpu
def test_leaving_early_loses_nothing_and_generations_share_an_address(backend: str) -> None:
    run_processes(2, _generations, backend, {"address": free_address(), "timeout_s": 20.0})


def _on_a_lifeline(rank: int, world_size: int, gang: dict[str, Any]) -> Any:
    losses: list[tuple[float, str]] = []
    lost = threading.Event()

    def on_loss(cause: str) -> None:
        losses.append((time.monotonic(), cause))
        lifeline.cut()
        lost.set()

    lifeline = Lifeline(join("gloo", rank, world_size, gang, timeout_s=20.0), on_loss)
    lifeline.watch()
    yield "watching"
    if gang["name"].endswith("parting"):
        time.sleep(0.1 * rank)  # farewells need not come at the same time
        lifeline.part(5.0)
        time.sleep(0.1)
    elif gang["name"].endswith("giving up") and rank == 0:
        lifeline.cut()
        time.sleep(0.1)
    else:
        lost.wait(10.0)
    return losses


def test_a_lifeline_tells_death_from_farewell(gang) -> None:
    with Ranks(4, _on_a_lifeline, {**gang, "name": gang["name"] + "/parting"}) as ranks:
        assert [outcome.value for outcome in ranks.join()] == [[], [], [], []]
    with Ranks(3, _on_a_lifeline, {**gang, "name": gang["name"] + "/giving up"}) as ranks:
        assert [len(outcome.value) for outcome in ranks.join()] == [0, 1, 1]
    with Ranks(4, _on_a_lifeline, gang) as ranks:
        for rank in range(4):
            ranks.milestone(rank)
        killed = time.monotonic()
        ranks.kill(2)
        for outcome in ranks.join(ranks=[0, 1, 3]):
            [(noticed, cause)] = outcome.value
            assert "died or left" in cause and noticed - killed < 2


# -------------------------------------------------------------------------------------------- again and again


def _moved_again(rank: int, world_size: int, backend: str, gang: dict[str, Any]) -> None:
    communicator = join(backend, rank, world_size, gang)
    for view in (communicator, communicator.subgroup(range(world_size)[::-1])):
        own = torch.zeros(3, device=view.device)
        received = {peer: torch.zeros(3, device=view.device) for peer in view.peers}
        sends, receives = view.messages(dict.fromkeys(view.peers, own)), view.messages(received)
        for value in range(0, 300, 100):
            own.fill_(value + view.rank)
            view.exchange(sends, receives).wait()
            for peer, tensor in received.items():
                assert tensor.eq(value + peer).all()
    for peer in communicator.peers[:1]:
        with pytest.raises(ValueError, match="not contiguous"):
            communicator.messages({peer: torch.zeros(4, 4, device=communicator.device).T[1:]})
    with pytest.raises(ValueError, match="cannot exchange"):
        communicator.messages({rank: torch.zeros(1, device=communicator.device)})


@every_backend
def test_tensors_that_were_looked_at_once_are_exchanged_as_often_as_wanted(backend: str, gang) -> None:
    run_processes(size(backend), _moved_again, backend, gang, device_type=device_type(backend))


# -------------------------------------------------------------------------------------------- mismatches


def _refused(rank: int, world_size: int, backend: str, gang: dict[str, Any]) -> None:
    communicator = join(backend, rank, world_size, gang)
    one = torch.zeros(4, 4, device=communicator.device)
    for peer in (rank, world_size, -1):
        with pytest.raises(ValueError, match=f"rank {rank} cannot exchange with rank {peer}"):
            communicator.exchange({peer: one}, {})
        with pytest.raises(ValueError, match=f"rank {rank} cannot exchange with rank {peer}"):
            communicator.exchange({}, {peer: one})
    for peer in communicator.peers[:1]:
        with pytest.raises(ValueError, match="not contiguous"):
            communicator.exchange({peer: one.T[1:]}, {})
        with pytest.raises(ValueError, match="meta"):
            communicator.exchange({}, {peer: one.to("meta")})
    assert not communicator.broken and communicator.bytes_sent == 0


@every_backend
def test_wrong_peers_and_tensors_are_refused_without_breaking_the_gang(backend: str, gang) -> None:
    run_processes(size(backend), _refused, backend, gang, device_type=device_type(backend))


def _sizes_disagree(rank: int, world_size: int, backend: str, gang: dict[str, Any]) -> str:
    communicator = join(backend, rank, world_size, gang)
    swap = ({1: torch.zeros(100)}, {}) if rank == 0 else ({}, {0: torch.zeros(50)})

    def until_noticed() -> None:
        communicator.exchange(*swap).wait()
        while True:  # a sender may have left its message behind, and hears of it later
            all_gather(communicator, list(torch.zeros(2, 1))).wait()

    return failure_of(until_noticed)[0]


@pytest.mark.parametrize(
    ("backend", "said"),
    [("shm", "rank 0 sent 400 bytes where 200 were expected"), ("gloo", "did not answer within 1.5 s")],
)
def test_peers_that_disagree_on_a_size_fail_but_live(backend: str, said: str, gang) -> None:
    gang["timeout_s"] = 1.5
    messages = run_processes(2, _sizes_disagree, backend, gang)
    assert any(said in message for message in messages)


def test_what_the_ranks_must_agree_on_is_checked_when_they_join(served: str, gang, monkeypatch) -> None:
    with pytest.raises(GangBroken, match=r"ranks \[1\] of gang .* did not join within 0.3 s"):
        join("gloo", 0, 2, gang, timeout_s=0.3)
    with pytest.raises(GangMismatch, match="rank 0 of gang .* is taken"):
        join("gloo", 0, 2, gang)
    with pytest.raises(GangMismatch, match="expects 3 ranks in gang .*, its peers 2"):
        join("gloo", 1, 3, gang)
    with pytest.raises(GangMismatch, match="asks for backend 'shm' in gang .*, its peers for 'gloo'"):
        join("shm", 1, 2, gang)
    with pytest.raises(ValueError, match="rank 2 is not within a gang of 2"):
        join("gloo", 2, 2, gang)
    with pytest.raises(ValueError, match="'local' is for one rank"):
        connect("local", world_size=2)
    with pytest.raises(ValueError, match="'local', 'shm', 'gloo' and 'nccl'"):
        connect("mpi", rank=0, world_size=1, **{**gang, "name": "backend"})
    with pytest.raises(ValueError, match="not 'host:port'"):
        join("gloo", 0, 1, gang, address="localhost")
    with pytest.raises(ValueError, match="pass an address"):
        connect("gloo", rank=0, world_size=2)
    with pytest.raises(ValueError, match="CPU tensors"):
        connect("gloo", address=served, device="cuda:0", name="device")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    with pytest.raises(ValueError, match="GLOO_SOCKET_IFNAME names 'nowhere0'"):
        join("gloo", 0, 1, gang, name="interface")
    with pytest.raises(GangBroken, match="no store answers"):
        join("gloo", 1, 2, gang, address=free_address(), timeout_s=0.5)


@pytest.mark.skipif(HAS_CUPY, reason="CuPy is installed")
def test_nccl_without_cupy_says_what_to_install(gang) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"distriray\[cuda12\]"):
        connect("nccl", rank=0, world_size=2, **gang)


def test_a_store_that_is_gone_is_a_broken_gang() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=1))
    del server
    with pytest.raises(GangBroken, match="the store where gang 'lost' meets does not answer"):
        connect("gloo", rank=1, world_size=2, store=store, timeout_s=1, name="lost")


def test_an_existing_store_serves_many_gangs(served: str) -> None:
    host, port = served.split(":")
    store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=5))
    first = connect("gloo", store=store, name="one of many")
    second = connect("gloo", store=store, name="another of many")
    first.close()
    second.exchange({}, {}).wait()
    second.close()


@on_the_cpu
def test_rank_0_serves_the_store_until_it_closes_even_when_broken(backend: str) -> None:
    address = free_address()
    host, port = address.split(":")

    def visit() -> TCPStore:
        return TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=0.5))

    communicator = connect(backend, address=address)
    communicator.abort()
    assert visit().check(["absent"]) is False
    communicator.close()
    with pytest.raises(torch.distributed.DistError):
        visit()


# -------------------------------------------------------------------------------------------- torchrun


def test_it_runs_under_torchrun() -> None:
    address = free_address()
    host, port = address.split(":")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", host, "--master-port", port, "-m", "tests.distributed.under_torchrun"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, free_address()], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("rank")) == [
        "rank 0 heard 1 at an address of its own",
        "rank 0 heard 1 at the agent's address",
        "rank 1 heard 0 at an address of its own",
        "rank 1 heard 0 at the agent's address",
    ]
