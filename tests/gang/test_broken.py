"""What ails a gang without killing it: requests that cannot be prepared, broken devices, pauses."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from distriray.config import ParallelConfig
from distriray.errors import InvalidRequest, OutOfMemory
from distriray.gang import BlockingHost, HostConfig, open_host
from distriray.models import ModelSpec
from distriray.requests import SamplingParams
from distriray.results import GenerationResult
from tests.gang.conftest import ask
from tests.gang.test_host import difference

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def pair(shared_host: BlockingHost, tiny_model: Path) -> Iterator[BlockingHost]:
    """Two workers who soon lose patience with each other."""
    config = HostConfig(
        model=ModelSpec(name=str(tiny_model)),
        workers=2,
        cpus_per_worker=0.5,
        device="cpu",
        parallel=ParallelConfig(exchange="sync"),
        timeout_s=TIMEOUT_S,
    )
    with open_host(config) as host:
        yield host


def pids(host: BlockingHost) -> list[int]:
    return [worker.pid for worker in host.status().workers]


def within(host: BlockingHost, index: int, deed: Any) -> Any:
    """Do something in the process of a worker."""
    member = host.host._dispatcher.group.member(index)
    assert member is not None
    return ray.get(member.remote._actor.__ray_call__.remote(deed))  # type: ignore[attr-defined]


async def until_whole(host: BlockingHost) -> None:
    while host.host.status().free_workers < 2:
        await asyncio.sleep(0.05)


def break_device(worker: Any) -> None:
    """As after an illegal memory access on a GPU: whatever uses the device raises, for ever."""

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    runner = worker.runner
    runner._denoiser.prepare = runner._denoiser.step = runner._denoiser.decode = runner.link = fails
    runner.device = torch.device("cuda", 99)  # there is none


@pytest.mark.parametrize("gang_size", [1, 2])
def test_what_a_scheduler_does_not_take_is_the_requests_own_error(pair: BlockingHost, gang_size: int) -> None:
    before = pids(pair)
    with pytest.raises(InvalidRequest, match="51"):
        pair.generate(ask(gang_size=gang_size, scheduler="lcm", num_inference_steps=51))
    status = pair.status()
    assert status.free_workers == 2 and pids(pair) == before  # at once: nothing had to be mended
    assert pair.generate(ask(gang_size=2)).repairs == 0


def test_memory_that_runs_out_ends_its_request_and_no_other(pair: BlockingHost) -> None:
    before = pids(pair)

    def too_much(worker: Any) -> None:
        prepare = worker.runner._denoiser.prepare

        def prepare_or_fail(params: SamplingParams) -> Any:
            if params.prompt == "too much":
                raise RuntimeError(
                    "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"
                )
            return prepare(params)

        worker.runner._denoiser.prepare = prepare_or_fail

    within(pair, 1, too_much)  # and not worker 0, which is ready to begin
    with pytest.raises(OutOfMemory, match="128x128"):
        pair.generate(ask(prompt="too much", gang_size=2))
    assert pair.status().free_workers == 2 and pids(pair) == before
    assert pair.generate(ask(gang_size=2)).repairs == 0


def test_a_worker_with_a_broken_device_is_replaced_and_no_request_of_thirty_fails(pair: BlockingHost) -> None:
    before = pids(pair)
    within(pair, 0, break_device)

    async def scene() -> list[GenerationResult]:
        requests = [ask(id=f"alone-{i}", gang_size=1, seed=i) for i in range(30)]
        results = await asyncio.gather(*map(pair.host.generate, requests))
        await until_whole(pair)
        return results

    results = pair.do(scene())
    assert len(results) == 30
    after = pids(pair)
    assert after[0] != before[0] and after[1] == before[1]
    assert "illegal memory access" in pair.status().repairs[-1].cause


def test_a_gang_whose_member_has_a_broken_device_is_mended(pair: BlockingHost) -> None:
    before, alone = pids(pair), pair.generate(ask(gang_size=1, num_inference_steps=100))

    async def scene() -> GenerationResult:
        task = asyncio.ensure_future(pair.host.generate(ask(id="hurt", gang_size=2, num_inference_steps=100)))
        while not (running := pair.host.status().running) or running[0].step < 10:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(within, pair, 1, break_device)
        result = await task
        await until_whole(pair)
        return result

    result = pair.do(scene())
    after = pids(pair)
    assert result.repairs == 1 and result.segments[-1].first_step >= 10
    assert difference(result, alone) <= 1
    assert after[0] == before[0] and after[1] != before[1]
    pair.do(pair.host.check_health())


def test_a_pause_in_which_nobody_dies_costs_no_step(pair: BlockingHost) -> None:
    before, alone = pids(pair), pair.generate(ask(gang_size=1, num_inference_steps=150))

    async def scene() -> GenerationResult:
        request = ask(id="paused", gang_size=2, num_inference_steps=150)
        task = asyncio.ensure_future(pair.host.generate(request))
        while not (running := pair.host.status().running) or running[0].step < 20:
            await asyncio.sleep(0.01)
        os.kill(before[1], signal.SIGSTOP)
        await asyncio.sleep(2 * TIMEOUT_S)
        os.kill(before[1], signal.SIGCONT)
        result = await task
        await until_whole(pair)
        return result

    result = pair.do(scene())
    first, second = result.segments
    assert result.repairs == 1 and second.first_step == first.last_step >= 20
    assert difference(result, alone) <= 1
    assert pids(pair) == before
