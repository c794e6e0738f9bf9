"""One image by processes that change gangs, and what a gang's end leaves behind."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from distriray import ParallelConfig, SamplingParams, parallelize
from distriray.collective import connect, launch, run_in_lockstep
from distriray.denoise import Denoiser
from distriray.errors import GangBroken
from tests.distributed.ranks import Ranks, free_address
from tests.models import tiny_sdxl
from tests.parameters import sweep
from tests.regroup import DISPLACED, REQUEST, changing_gangs
from tests.save_model import MODELS

pytestmark = pytest.mark.distributed


def test_processes_that_change_gangs_draw_what_ranks_in_lock_step_draw() -> None:
    turns = run_in_lockstep(3, functools.partial(changing_gangs, config=DISPLACED, scheduler="dpmpp-2m"))
    apart = launch(3, changing_gangs, DISPLACED, "dpmpp-2m", backend="gloo")
    for (latents, fresh), (others, also_fresh) in zip(turns, apart, strict=True):
        assert torch.equal(latents, others) and fresh == also_fresh


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


IMAGE = {"prompt": "a lake", "seed": 1, "height": 160, "width": 96, "num_inference_steps": 6}


def bereaved(rank: int, world_size: int, address: str, model: str) -> Iterator[Any]:
    """Three steps together; then rank 1 is killed, and rank 0 draws the rest: its picture."""
    pipeline = parallelize(
        MODELS[model](),
        connect("gloo", rank=rank, world_size=world_size, address=address, timeout_s=60.0),
        ParallelConfig(exchange="sync"),
    )
    denoiser = Denoiser(pipeline)
    state = denoiser.prepare(SamplingParams(**IMAGE))
    for _ in range(3):
        denoiser.step(state)
    yield "half way"
    while rank == 1:
        time.sleep(0.1)
    with pytest.raises(GangBroken):
        denoiser.step(state)
    assert state.step == 3
    parallelize(pipeline, connect("local"), ParallelConfig(exchange="sync"))
    while not state.done:
        denoiser.step(state)
    return np.asarray(denoiser.decode(state)[0])


@pytest.mark.parametrize(
    "model",
    sweep(
        [
            "flux-dev",
            "chroma",
            "flux2-klein",
            "hunyuan-image",
            "qwen-image",
            "qwen-image-2.1",
            "sd3",
            "z-image",
        ]
    ),
)
def test_a_picture_of_a_transformer_is_whole_though_a_rank_is_killed(model: str) -> None:
    with Ranks(2, bereaved, free_address(), model) as ranks:
        for rank in range(2):
            assert ranks.milestone(rank) == "half way"
        ranks.kill(1)
        (survivor,) = ranks.join(60, ranks=[0])
    assert survivor.error is None, survivor.error
    denoiser = Denoiser(MODELS[model]())
    state = denoiser.prepare(SamplingParams(**IMAGE))
    while not state.done:
        denoiser.step(state)
    alone = np.asarray(denoiser.decode(state)[0])
    assert np.ptp(alone) > 50  # it shows something
    assert np.abs(survivor.value.astype(int) - alone.astype(int)).max() <= 1
