"""Workers and drivers that die; 200 random requests with pauses, cancellations and a kill."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from distriray.errors import DistrirayError, GenerationCancelled, QueueFull
from distriray.gang import BlockingHost
from distriray.requests import GenerationRequest
from distriray.results import GenerationResult
from tests.gang.conftest import ask, policy_of
from tests.gang.policies import Shuffle
from tests.gang.test_host import difference

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


async def whole(host: BlockingHost) -> None:
    """Wait until all workers are healthy and free."""
    while host.host.status().free_workers < 4:
        await asyncio.sleep(0.05)


async def kill_one_at(host: BlockingHost, request_id: str, step: int, rank: int) -> int:
    """`kill -9` the worker of `rank` once `request_id` has done `step` steps; its index."""
    while True:
        running = {request.id: request for request in host.host.status().running}
        if request_id in running and running[request_id].step >= step:
            workers = running[request_id].workers
            assert workers is not None
            os.kill(host.host.status().workers[workers[rank]].pid, signal.SIGKILL)
            return workers[rank]
        await asyncio.sleep(0.01)


def commands(process: psutil.Process) -> list[str]:
    """What every process below `process` runs; one that has just ended runs nothing."""
    told = []
    for child in process.children(recursive=True):
        with suppress(psutil.Error):
            told.append(" ".join(child.cmdline()))
    return told


def test_a_worker_killed_while_its_gang_decodes_costs_no_step(host: BlockingHost) -> None:
    large = {"height": 1024, "width": 1024, "num_inference_steps": 2}
    alone = host.generate(ask(gang_size=1, **large))

    async def scene() -> GenerationResult:
        task = asyncio.ensure_future(host.host.generate(ask(id="late", gang_size=2, **large)))
        await kill_one_at(host, "late", 2, 1)
        result = await task
        await whole(host)
        return result

    result = host.do(scene())
    assert result.repairs == 1
    assert result.segments[-1].first_step == result.segments[-1].last_step == 2
    assert difference(result, alone) <= 1


def test_a_lone_worker_that_dies_costs_its_steps_but_not_the_request(host: BlockingHost) -> None:
    async def scene() -> GenerationResult:
        task = asyncio.ensure_future(host.host.generate(ask(id="lone", gang_size=1, num_inference_steps=60)))
        await kill_one_at(host, "lone", 5, 0)
        result = await task
        await whole(host)
        return result

    result = host.do(scene())
    assert result.repairs == 1 and result.segments[-1].first_step == 0


def test_every_random_request_ends_once_and_the_host_ends_as_it_began(host: BlockingHost) -> None:
    draw = random.Random(5)
    policy_of(host).change(Shuffle(seed=5))
    count = 200

    async def one(request: GenerationRequest) -> str:
        try:
            result = await host.host.generate(request)
        except DistrirayError as error:
            return type(error).__name__
        assert sum(segment.steps for segment in result.segments) >= request.num_inference_steps
        assert result.segments[-1].last_step == request.num_inference_steps
        return "result"

    async def scene() -> list[str]:
        tasks = []
        for index in range(count):
            request = ask(
                id=f"random-{index}",
                seed=index,
                num_inference_steps=draw.randint(2, 12),
                gang_size=draw.choice(["auto", 1, 2, 4]),
            )
            tasks.append(asyncio.ensure_future(one(request)))
            await asyncio.sleep(draw.uniform(0.0, 0.2))
            if draw.random() < 0.1:
                await host.host.cancel(f"random-{draw.randint(0, index)}")
            if index in (60, 140):
                pid = host.host.status().workers[draw.randrange(4)].pid
                os.kill(pid, signal.SIGKILL)
        ends = await asyncio.gather(*tasks)
        await whole(host)
        return ends

    ends = host.do(scene())
    allowed = {"result", GenerationCancelled.__name__, QueueFull.__name__}
    assert len(ends) == count and set(ends) <= allowed
    assert ends.count("result") > 0


DRIVER = """
import sys
from distriray.gang import HostConfig, open_host
from distriray.requests import GenerationRequest
config = HostConfig(model={"name": sys.argv[1]}, workers=2, device="cpu")
with open_host(config, cpus=2) as host:
    print(*[worker.pid for worker in host.status().workers], flush=True)
    host.generate(GenerationRequest(prompt="x", gang_size=2, num_inference_steps=200))
"""


@pytest.mark.usefixtures("workers_of_their_own")
def test_nothing_outlives_a_killed_driver(tiny_model: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tiny_model)], stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    workers = {int(pid) for pid in driver.stdout.readline().split()}
    started = {child.pid: child for child in psutil.Process(driver.pid).children(recursive=True)}
    assert len(workers) == 2 and workers <= started.keys()
    driver.kill()
    driver.wait()
    _, alive = psutil.wait_procs(started.values(), timeout=10)
    assert not alive


@pytest.mark.usefixtures("workers_of_their_own")
def test_an_interrupted_command_leaves_nothing_behind(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "lake.png"
    arguments = [
        "generate",
        "x",
        "--gang-size",
        "2",
        "--steps",
        "200",
        "--model",
        str(tiny_model),
        "--cpus",
        "2",
    ]
    command = subprocess.Popen(
        [sys.executable, "-m", "distriray", *arguments, "--out", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in a shell's background hands an ignored SIGINT down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    me = psutil.Process(command.pid)
    deadline = time.monotonic() + 120
    while not any("ray::Worker.run" in line for line in commands(me)):
        assert time.monotonic() < deadline, "no worker ran"
        time.sleep(0.05)
    started = me.children(recursive=True)
    assert started
    command.send_signal(signal.SIGINT)
    _, told = command.communicate(timeout=60)
    assert command.returncode == 130 and told.strip().endswith("interrupted")
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive and not out.exists()
