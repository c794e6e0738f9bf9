"""What `NcclCommunicator` does with streams and threads, on devices that are none."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from distriray.collective import all_gather, nccl
from distriray.collective.nccl import NcclCommunicator
from distriray.errors import GangBroken

from .machine import Machine

AT_ONCE_S = 0.05


@pytest.fixture
def machine(request, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = Machine(monkeypatch, **getattr(request, "param", {}))
    yield machine
    machine.close()


jittering = pytest.mark.parametrize("machine", [{"jitter_s": 0.002}], indirect=True)


def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> float:
    """Seconds until it held."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, "it never came true"
        time.sleep(0.002)
    return time.monotonic() - start


def failure_of(verb: Callable[[], Any]) -> tuple[str, float]:
    start = time.monotonic()
    with pytest.raises(GangBroken) as raised:
        verb()
    return str(raised.value), time.monotonic() - start


def to_peers(communicator: NcclCommunicator, tensor: torch.Tensor) -> dict[int, torch.Tensor]:
    return dict.fromkeys(communicator.peers, tensor)


# ------------------------------------------------------------------------------------------ what arrives


@jittering
def test_what_was_computed_arrives_in_order_and_before_it_is_used(machine: Machine) -> None:
    """Buffers are used again and again, with nothing but the communicator's own order between uses."""
    cuda, rounds, world_size = machine.cuda, 30, 3

    def rank(rank: int, communicator: NcclCommunicator) -> int:
        lengths = [1 + (7 * index) % 50 for index in range(rounds)]
        outbox = torch.zeros(50, dtype=torch.int64)
        inbox = {peer: torch.zeros(50, dtype=torch.int64) for peer in communicator.peers}
        seen: list[tuple[int, int, torch.Tensor]] = []

        def look(index: int) -> None:
            seen.extend((index, peer, inbox[peer][: lengths[index]].clone()) for peer in inbox)

        for index, length in enumerate(lengths):
            cuda.compute(lambda index=index: outbox.copy_(torch.arange(50) + 1000 * index + 100 * rank))
            part = {peer: tensor[:length] for peer, tensor in inbox.items()}
            communicator.exchange(to_peers(communicator, outbox[:length]), part).wait()
            cuda.compute(lambda index=index: look(index))
        cuda.until(torch.cuda.current_stream().query)
        for index, peer, values in seen:
            assert values.tolist() == [place + 1000 * index + 100 * peer for place in range(len(values))]
        assert communicator.bytes_sent == 8 * (world_size - 1) * sum(lengths)
        return len(seen)

    assert machine.each(rank, machine.gang(world_size), ranks=world_size) == [60, 60, 60]


@jittering
def test_many_in_flight_one_way_or_empty(machine: Machine) -> None:
    def rank(rank: int, communicator: NcclCommunicator) -> None:
        right, left = (rank + 1) % 3, (rank - 1) % 3
        empty, works, own, taken = torch.empty(0, 4), [], [], []
        for index in range(20):
            taken.append(torch.zeros(5 + index))
            own.append(torch.full((5 + index,), 100.0 * index + rank))
            works.append(communicator.exchange({right: own[-1]}, {left: taken[-1]}))
            works.append(communicator.exchange(to_peers(communicator, empty), {}))
        for work in reversed(works):
            work.wait()
            work.wait()
        for index, tensor in enumerate(taken):
            assert machine.cuda.read(tensor).eq(100.0 * index + left).all()

    machine.each(rank, machine.gang(3), ranks=3)


@jittering
def test_views_share_the_order_of_their_parent(machine: Machine) -> None:
    def rank(rank: int, communicator: NcclCommunicator) -> None:
        views = [communicator, communicator.subgroup([2, 1, 0]), communicator.subgroup([rank])]
        if rank < 2:
            views.append(communicator.subgroup([1, 0]))
        works, rows = [], []
        for index in range(12):
            for view in views:
                rows.append((view.world_size, index, list(torch.zeros(view.world_size, 2))))
                rows[-1][2][view.rank].fill_(10.0 * index + view.rank)
                works.append(all_gather(view, rows[-1][2]))
        for work in works:
            work.wait()
        for world_size, index, tensors in rows:
            for sender in range(world_size):
                assert machine.cuda.read(tensors[sender]).eq(10.0 * index + sender).all()

    machine.each(rank, machine.gang(3), ranks=3)


# ---------------------------------------------------------------------------------------------- memory


def tracked(length: int = 4) -> tuple[torch.Tensor, weakref.ref[Any]]:
    """A tensor, and what tells whether its memory is still somebody's."""
    memory = np.zeros(length, dtype=np.float32)
    return torch.from_numpy(memory), weakref.ref(memory)


def test_a_transfer_holds_its_tensors_until_it_is_over(machine: Machine) -> None:
    first, second = machine.gang()
    (sent, sent_memory), (received, received_memory) = tracked(), tracked()
    machine.on(0, first.exchange, {1: sent}, {1: received})  # nobody ever waits for it
    del sent, received
    time.sleep(2 * nccl.WATCH_INTERVAL_S)
    machine.on(0, lambda: first.exchange({}, {}))
    assert sent_memory() is not None and received_memory() is not None
    machine.on(1, lambda: second.exchange({0: torch.ones(4)}, {0: torch.zeros(4)}))
    until(lambda: not first._pending and not second._pending)
    machine.on(0, lambda: first.exchange({}, {}))
    assert sent_memory() is None and received_memory() is None


def test_a_transfer_lets_its_tensors_go_once_the_current_stream_is_behind_it(machine: Machine) -> None:
    first, _ = machine.gang()
    received, memory = tracked()
    work = machine.on(0, first.exchange, {}, {1: received})
    del received
    assert memory() is not None
    machine.on(0, work.wait)
    assert memory() is None and not machine.on(0, work.done.query)


def test_nothing_is_held_after_an_abort(machine: Machine) -> None:
    first, _ = machine.gang()
    received, memory = tracked()
    machine.on(0, first.exchange, {}, {1: received})
    del received
    machine.on(0, first.abort)
    assert not first._pending and memory() is None


# ---------------------------------------------------------------------------------------------- failure


def test_abort_ends_what_is_pending_and_the_peers_notice(machine: Machine) -> None:
    first, second = machine.gang()
    never = torch.zeros(1)
    works = [
        machine.on(rank, lambda c=c: c.exchange({}, to_peers(c, never)))
        for rank, c in enumerate((first, second))
    ]
    machine.on(0, first.abort)
    until(lambda: second.broken)
    for rank, work in enumerate(works):
        assert machine.on(rank, lambda work=work: failure_of(work.wait))[1] < AT_ONCE_S
    assert "aborted on rank 0" in failure_of(first.check)[0]


def test_calls_fail_at_once_while_the_abort_still_waits_for_the_device(machine: Machine) -> None:
    """An abort returns once the device has done all that was queued before the transfers."""
    first, _ = machine.gang()

    def rank() -> None:
        never = {1: torch.zeros(1)}
        gate = machine.block()
        work = first.exchange({}, never)
        with ThreadPoolExecutor(1) as other:
            abort = other.submit(machine.on, 0, first.abort)
            until(first._calling.locked)
            for verb in (work.wait, lambda: first.exchange({}, never), first.check):
                assert failure_of(verb)[1] < AT_ONCE_S
            assert not abort.done()
            gate.set()

    machine.on(0, rank)


def test_a_dead_peer_is_noticed_at_once(machine: Machine) -> None:
    name = machine.name()
    gang = machine.each(lambda rank: machine.join(name, rank, 3), ranks=3)
    for rank in (0, 1):
        machine.on(rank, lambda c=gang[rank]: c.exchange({}, {2: torch.zeros(1)}))
    machine.controls[name, 2].abort()  # what the kernel does with the connections of a process that dies
    assert until(lambda: gang[0].broken and gang[1].broken) < 1.0
    assert any("rank 2 died or left" in failure_of(c.check)[0] for c in gang[:2])


def test_a_hung_peer_is_noticed_in_time_counted_from_when_the_stream_is_there(machine: Machine) -> None:
    first, _ = machine.gang(timeout_s=0.3)

    def rank() -> None:
        gate = machine.block()
        work = first.exchange({}, {1: torch.zeros(1)})
        work.wait()  # which does not block the host
        time.sleep(0.5)
        first.check()
        gate.set()
        assert 0.25 < until(lambda: first.broken) < 0.6
        assert "a transfer with ranks [1] did not end within 0.3 s" in failure_of(work.wait)[0]

    machine.on(0, rank)


def test_one_gang_hangs_and_the_other_of_the_same_devices_goes_on(machine: Machine) -> None:
    hung, well = machine.gang(timeout_s=0.3), machine.gang()
    machine.on(0, lambda: hung[0].exchange({}, {1: torch.zeros(1)}))

    def rank(rank: int, communicator: NcclCommunicator) -> None:
        for index in range(40):
            rows = list(torch.full((2, 3), 10.0 * index + rank))
            all_gather(communicator, rows).wait()
            assert machine.cuda.read(rows[1 - rank]).eq(10.0 * index + 1 - rank).all()
            time.sleep(0.01)

    machine.each(rank, well)
    assert hung[0].broken and not well[0].broken


def test_a_gang_that_breaks_at_rest_does_not_wait_for_one_that_runs_until_it_is_closed(
    machine: Machine,
) -> None:
    """A worker that dies breaks gangs of all sizes, of which its peers are at work in one."""
    running, idle = machine.gang(), machine.gang()
    never = [torch.zeros(1), torch.zeros(1)]
    until(lambda: not any(communicator._pending for communicator in idle))
    machine.on(0, lambda: running[0].exchange({}, {1: never[0]}))
    with ThreadPoolExecutor(1) as other:
        other.submit(machine.on, 0, idle[0].abort).result(5)
        until(lambda: idle[1].broken)
        assert failure_of(idle[0].check) and not running[0].broken and running[0]._pending
        assert not idle[0]._communicator._aborted
        closing = other.submit(idle[0].close)  # of a worker at rest, which has nothing to wait for
        machine.on(1, lambda: running[1].exchange({0: never[1]}, {}))
        closing.result(5)
    assert idle[0]._communicator._aborted


def test_a_communicator_is_released_once(machine: Machine) -> None:
    first, _ = machine.gang()

    def rank() -> None:
        gate = machine.block()
        first.exchange({}, {1: torch.zeros(1)})
        with ThreadPoolExecutor(2) as others:
            ends = [others.submit(machine.on, 0, end) for end in (first.abort, first.close)]
            until(lambda: first._communicator._aborted)
            gate.set()
            for end in ends:
                end.result(5)

    releases, abort = list[None](), first._communicator.abort
    first._communicator.abort = lambda: (releases.append(None), abort())
    machine.on(0, rank)
    assert len(releases) == 1


def test_streams_come_back_after_an_abort_and_are_never_shared(machine: Machine) -> None:
    old, other = machine.gang(), machine.gang()
    streams = [c._stream for c in (*old, *other)]
    assert len(set(streams)) == 4 and all(stream.priority == -1 for stream in streams)
    for rank, communicator in enumerate(old):
        machine.on(rank, communicator.abort)
    new, newer = machine.gang(), machine.gang()
    assert [c._stream for c in new] == streams[:2]
    assert not {c._stream for c in newer}.intersection(streams)


def test_a_start_that_fails_takes_no_stream(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.nccl, "NcclCommunicator", lambda *_: 1 / 0)
    name = machine.name()
    machine.each(lambda rank: failure_of(lambda: machine.join(name, rank)))
    assert not any(stream.priority == -1 for stream in machine.cuda.streams)


# ------------------------------------------------------------------------------------------------ starting


def test_joining_does_not_wait_for_what_the_device_has_to_compute(machine: Machine) -> None:
    gate = machine.on(0, machine.block)
    start = time.monotonic()
    machine.gang(timeout_s=2.0)
    assert time.monotonic() - start < 1.0 and not gate.is_set()


@pytest.mark.parametrize("call", ["get_unique_id", "NcclCommunicator"])
def test_an_error_of_the_start_breaks_the_gang_and_ends_its_control(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no interface")

    monkeypatch.setattr(machine.nccl, call, fails)
    name = machine.name()

    def rank(rank: int) -> tuple[str, float]:
        return failure_of(lambda: machine.join(name, rank))

    failures = machine.each(rank)
    assert "no interface" in failures[0][0]
    assert all(seconds < 2.0 for _, seconds in failures), failures
    assert all(machine.controls[name, rank].broken for rank in range(2))


def test_a_start_that_nobody_joins_ends_in_time(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.nccl, "NcclCommunicator", lambda *_: machine.cuda.until(lambda: False))
    name = machine.name()
    for message, seconds in machine.each(
        lambda rank: failure_of(lambda: machine.join(name, rank, timeout_s=0.3))
    ):
        assert "could not connect 2 ranks within 0.3 s" in message and seconds < 1.0


# ----------------------------------------------------------------------------------- gangs side by side


@pytest.mark.parametrize(
    ("machine", "beside", "goes"),
    [
        ({"one_queue": False}, True, True),
        ({"one_queue": True}, True, False),
        ({"one_queue": True}, False, True),
    ],
    indirect=["machine"],
)
def test_linking_beside_compute_hangs_where_streams_share_a_queue(
    machine: Machine, beside: bool, goes: bool
) -> None:
    """Two devices whose kernels of two gangs are launched in opposite orders wait for each other.

    Linking beside compute leaves the order to chance; between segments it is the same on all devices.
    """
    running, name = machine.gang(timeout_s=0.6), machine.name()
    rows = torch.zeros(2, 2, 1)

    def compute(rank: int) -> None:
        all_gather(running[rank], list(rows[rank])).wait()

    def link(rank: int) -> None:
        machine.join(name, rank, timeout_s=0.6)

    def rank(rank: int) -> None:
        device = torch.device("cpu", rank)
        if not beside:
            compute(rank)
            return link(rank)
        before = machine.nccl.groups[device]
        with ThreadPoolExecutor(1) as other:
            if rank == 0:
                compute(rank)
            linking = other.submit(machine.on, rank, link, rank)
            if rank == 1:
                until(lambda: machine.nccl.groups[device] > before)
                compute(rank)
            linking.result(10)

    if goes:
        machine.each(rank)
        for index, communicator in enumerate(running):
            machine.on(index, lambda c=communicator: c._await(c._stream.query, 1.0, "end"))
    else:
        with pytest.raises(GangBroken, match=r"within 0\.6 s|died or left"):
            machine.each(rank)
