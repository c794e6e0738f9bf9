"""Which device a worker computes on."""

from __future__ import annotations

import asyncio
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from distriray.errors import NotEnoughDevices
from distriray.gang import placement
from distriray.gang.config import HostConfig
from distriray.gang.devices import DEVICES, Cpu, place_of
from distriray.gang.placement import Placement
from distriray.gang.worker import Worker


@pytest.mark.parametrize(
    ("gpu", "listed", "gpus", "place"),
    [
        (3, "3", 1, 0),  # as Ray does it: each worker sees its own
        ("GPU-5f0e", "GPU-5f0e", 1, 0),
        (0, None, 2, 0),  # all workers see all
        (1, None, 2, 1),
        ("4", "2, 4", 2, 1),
        (1, None, 1, 0),  # Ray was told of more than there are
        (5, None, 4, 1),
        (1, None, 0, 0),  # none: torch says so
    ],
)
def test_a_worker_computes_on_the_gpu_that_ray_reserved(
    gpu: int | str, listed: str | None, gpus: int, place: int
) -> None:
    environment = {} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}
    assert place_of(gpu, environment, gpus) == place


@pytest.mark.parametrize(("device", "beside"), [("cpu", True), ("cuda", False)])
def test_a_worker_forms_gangs_beside_what_it_computes_unless_all_must_rest(device: str, beside: bool) -> None:
    worker = Worker(HostConfig(workers=1), device, "nowhere:1")
    assert (worker._linking is not worker._compute) is beside is not DEVICES[device].links_at_rest


def test_a_worker_answers_while_the_memory_of_its_device_cannot_be_looked_up() -> None:
    """Torch's allocator is locked while memory is given back, until all that the GPU was given is done."""
    allocator = threading.Lock()

    class Busy(Cpu):
        def memory(self) -> int:
            assert allocator.acquire(timeout=5), "it asks for what may be locked as long as a peer hangs"
            allocator.release()
            return threading.get_ident()

    def computes(*_: Any) -> int:
        started.set()
        with allocator:
            return threading.get_ident() if asked.wait(10) else 0

    async def scene() -> None:
        running = asyncio.ensure_future(worker.run(None, None, None))  # type: ignore[arg-type]
        await asyncio.to_thread(started.wait, 10)
        assert (await worker.ping())[1] == 3
        asked.set()
        computed_by = await running
        assert (await worker.ping())[0] == computed_by

    started, asked = threading.Event(), threading.Event()
    worker = Worker(HostConfig(workers=1), "cpu", "nowhere:1")
    worker._kind = Busy()
    worker._runner = SimpleNamespace(run=computes, held=3)  # type: ignore[assignment]
    asyncio.run(scene())


@pytest.mark.parametrize(
    ("device", "most", "told"), [("cuda", None, None), ("cuda", 8, "8"), ("cpu", 8, None)]
)
def test_nccl_is_told_its_bound_before_a_worker_of_a_gpu_runs(
    device: str, most: int | None, told: str | None
) -> None:
    """It reads the variable when a process makes its first communicator, and never again."""
    placement: Any = Placement(None, 0, False, device, HostConfig(nccl_max_ctas=most))  # type: ignore[arg-type]
    assert placement.options(0)["runtime_env"]["env_vars"].get("NCCL_MAX_CTAS") == told


@pytest.mark.parametrize("most", [0, 65])
def test_a_bound_that_nccl_would_change_without_a_word_is_refused(most: int) -> None:
    with pytest.raises(ValueError, match="nccl_max_ctas"):
        HostConfig(nccl_max_ctas=most)


GPUS, CPUS = {"CPU": 2.0, "GPU": 8.0}, {"CPU": 64.0}
HALVES = {"CPU": 1.5, "GPU": 8.0}


@pytest.mark.parametrize(
    ("strategy", "nodes", "says"),
    [
        ("STRICT_PACK", [{"CPU": 64.0, "GPU": 2.0}], "on one node.* use at most 2 workers"),
        ("STRICT_PACK", [CPUS], "not one does"),
        ("STRICT_PACK", [GPUS, CPUS], "use at most 2 workers"),
        ("PACK", [HALVES, HALVES, CPUS], "on the cluster.* use at most 2 workers"),
        ("PACK", [GPUS, GPUS, CPUS], None),
        ("STRICT_PACK", [{"CPU": 4.0, "GPU": 4.0}, CPUS], None),
    ],
)
def test_a_host_that_is_too_large_is_told_what_would_fit(
    strategy: str, nodes: list[dict[str, float]], says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worker has its CPU on one node and its GPU on another."""
    alive = [{"Alive": True, "Resources": resources} for resources in nodes]
    monkeypatch.setattr(placement.ray, "nodes", lambda: alive)
    config = HostConfig(workers=4, device="cuda", strategy=strategy)
    with nullcontext() if says is None else pytest.raises(NotEnoughDevices, match=says):
        placement._check_room(config, {"CPU": 1.0, "GPU": 1.0})


def test_parts_of_a_cpu_are_counted_as_ray_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 0.7}}])
    placement._check_room(HostConfig(workers=7, device="cpu"), {"CPU": 0.1})


def test_a_host_says_that_it_waits_for_room(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        room = asyncio.get_running_loop().create_future()
        group = SimpleNamespace(ready=lambda: room)
        monkeypatch.setattr(placement, "placement_group", lambda *_, **__: group)
        making = asyncio.ensure_future(Placement.make(HostConfig(workers=4, device="cpu")))
        while not caplog.records:
            await asyncio.sleep(0.001)
        room.set_result(None)
        assert (await making).owned

    monkeypatch.setattr(placement, "PATIENCE_S", 0.0)
    monkeypatch.setattr(placement.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 64.0}}])
    monkeypatch.setattr(placement.ray.util, "get_current_placement_group", lambda: None)
    asyncio.run(asyncio.wait_for(scene(), 10))
    (said,) = caplog.messages
    assert "waits for 4 times {'CPU': 1.0} on one node" in said and "600 s" in said
