"""One image by changing gangs, and what a gang's end leaves behind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from distriray import ParallelConfig, SamplingParams, parallelize
from distriray.collective import Communicator, connect
from distriray.denoise import Denoiser, DenoiseState
from distriray.errors import GangBroken
from distriray.parallel import engine_of
from tests.distributed.ranks import Ranks, free_address, run_processes
from tests.models import tiny_sdxl

pytestmark = pytest.mark.distributed

REQUEST: dict[str, Any] = {
    "prompt": "a lake",
    "seed": 1,
    "height": 136,
    "width": 96,
    "num_inference_steps": 10,
    "guidance_scale": 5.0,
}
SCHEDULERS = ["ddim", "dpmpp-2m", "euler-ancestral"]


def alone(scheduler: str) -> torch.Tensor:
    denoiser = Denoiser(tiny_sdxl())
    state = denoiser.prepare(SamplingParams(**REQUEST, scheduler=scheduler))
    while not state.done:
        denoiser.step(state)
    return state.latents


def _hand_over(communicator: Communicator, state: DenoiseState | None) -> DenoiseState:
    """Rank 0's state, for every rank."""
    others = range(1, communicator.world_size)
    if communicator.rank == 0:
        assert state is not None
        blob = torch.frombuffer(bytearray(state.to_bytes()), dtype=torch.uint8)
        size = torch.tensor([blob.numel()])
        communicator.exchange(dict.fromkeys(others, size), {}).wait()
        communicator.exchange(dict.fromkeys(others, blob), {}).wait()
        return state
    size = torch.zeros(1, dtype=torch.int64)
    communicator.exchange({}, {0: size}).wait()
    blob = torch.empty(int(size), dtype=torch.uint8)
    communicator.exchange({}, {0: blob}).wait()
    return DenoiseState.from_bytes(blob.numpy().tobytes())


def changing_gangs(
    rank: int, world_size: int, address: str, config: dict[str, Any]
) -> list[tuple[torch.Tensor, list[bool]]]:
    """Steps 1-3 by ranks 0 and 1, 4-6 by all, 7-10 by rank 0: the latents, and which steps were fresh."""
    communicator = connect("gloo", rank=rank, world_size=world_size, address=address, timeout_s=60)
    pipeline = parallelize(tiny_sdxl(), connect("local"))
    engine = engine_of(pipeline)
    assert engine is not None
    denoiser = Denoiser(pipeline)
    results = []
    for scheduler in SCHEDULERS:
        fresh: list[bool] = []

        def steps(state: DenoiseState, gang: Communicator, count: int, fresh: list[bool] = fresh) -> None:
            parallelize(pipeline, gang, ParallelConfig(**config))
            for _ in range(count):
                denoiser.step(state)
                fresh.append(engine.statistics.synchronous)

        state = None
        if rank < 2:
            state = denoiser.prepare(SamplingParams(**REQUEST, scheduler=scheduler))
            steps(state, communicator.subgroup([0, 1]), 3)
        state = _hand_over(communicator, state)
        steps(state, communicator, 3)
        if rank == 0:
            steps(state, connect("local"), 4)
        results.append((state.latents, fresh))
    return results


def test_changing_gangs_in_sync_mode_equal_one_device() -> None:
    config = {"exchange": "sync", "cfg_parallel": False}
    results = run_processes(4, changing_gangs, free_address(), config, timeout_s=170)[0]
    for scheduler, (latents, _) in zip(SCHEDULERS, results, strict=True):
        reference = alone(scheduler)
        assert (latents - reference).abs().max() <= 1e-4 * reference.abs().max(), scheduler


def test_changing_gangs_in_displaced_mode_start_with_one_fresh_step() -> None:
    config = {"exchange": "displaced", "cfg_parallel": False, "warmup_steps": 1}
    results = run_processes(4, changing_gangs, free_address(), config, timeout_s=170)[0]
    for scheduler, (latents, fresh) in zip(SCHEDULERS, results, strict=True):
        assert fresh[:6] == [True, False, False, True, False, False], "each gang's first step, and no other"
        reference = alone(scheduler)
        assert latents.isfinite().all()
        assert (latents - reference).norm() <= 0.3 * reference.norm(), scheduler


def endless(rank: int, world_size: int, address: str, timeout_s: float) -> Iterator[Any]:
    """Steps without end; the second milestone of each survivor is how the gang ended and after how long."""
    communicator = connect("gloo", rank=rank, world_size=world_size, address=address, timeout_s=timeout_s)
    pipeline = parallelize(
        tiny_sdxl(), communicator, ParallelConfig(exchange="displaced", warmup_steps=1, cfg_parallel=False)
    )
    denoiser = Denoiser(pipeline)
    state = denoiser.prepare(SamplingParams(**{**REQUEST, "num_inference_steps": 900}))
    for _ in range(3):
        denoiser.step(state)
    yield "running"
    last = time.monotonic()
    try:
        while True:
            denoiser.step(state)
            last = time.monotonic()
    except GangBroken:
        seconds = time.monotonic() - last
    parallelize(pipeline, connect("local"))
    done = state.step
    denoiser.step(state)  # the state is whole: another gang, here of one, goes on
    assert state.step == done + 1 and state.latents.isfinite().all()
    return seconds


@pytest.mark.parametrize(("how", "timeout_s", "bound_s"), [("kill", 60.0, 5.0), ("stop", 8.0, 11.0)])
def test_a_peer_that_dies_or_hangs_breaks_the_gang_of_every_survivor(
    how: str, timeout_s: float, bound_s: float
) -> None:
    with Ranks(4, endless, free_address(), timeout_s) as ranks:
        for rank in range(4):
            assert ranks.milestone(rank) == "running"
        getattr(ranks, how)(2)
        for outcome in ranks.join(60, ranks=[0, 1, 3]):
            assert outcome.error is None, outcome.error
            assert outcome.value <= bound_s
