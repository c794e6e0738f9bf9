"""One image by changing gangs, as ranks in processes and ranks in lock-step run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from distriray import ParallelConfig, SamplingParams, parallelize
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.denoise import Denoiser, DenoiseState
from distriray.parallel import engine_of
from tests.models import tiny_sdxl

REQUEST: dict[str, Any] = {
    "prompt": "a lake",
    "seed": 1,
    "height": 136,
    "width": 96,
    "num_inference_steps": 8,
    "guidance_scale": 5.0,
}
SYNC = ParallelConfig(exchange="sync", cfg_parallel=False)
DISPLACED = ParallelConfig(exchange="displaced", warmup_steps=1, cfg_parallel=False)


def hand_over(communicator: Communicator, state: DenoiseState | None) -> DenoiseState:
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
    communicator: Communicator, config: ParallelConfig, scheduler: str
) -> tuple[torch.Tensor, list[bool]]:
    """Steps 1-3 by ranks 0 and 1, 4-6 by all, 7 and 8 by rank 0: the latents, and which steps were fresh."""
    pipeline = parallelize(tiny_sdxl(), connect("local"))
    denoiser, engine = Denoiser(pipeline), engine_of(pipeline)
    assert engine is not None
    fresh: list[bool] = []

    def steps(state: DenoiseState, gang: Communicator, count: int) -> None:
        parallelize(pipeline, gang, config)
        for _ in range(count):
            denoiser.step(state)
            fresh.append(engine.statistics.synchronous)

    state = None
    if communicator.rank < 2:
        state = denoiser.prepare(SamplingParams(**REQUEST, scheduler=scheduler))
        steps(state, communicator.subgroup([0, 1]), 3)
    state = hand_over(communicator, state)
    steps(state, communicator, 3)
    if communicator.rank == 0:
        steps(state, connect("local"), 2)
    return state.latents, fresh


def drawn(denoiser: Denoiser, state: DenoiseState) -> np.ndarray:
    """The first picture, when the rest of the steps are done."""
    while not state.done:
        denoiser.step(state)
    denoiser.settle(state)
    return np.asarray(denoiser.decode(state)[0], dtype=int)


def drawn_in_turn(
    make: Callable[[], Any],
    load: Callable[[Any], Denoiser],
    params: SamplingParams,
    sizes: Sequence[int],
    config: dict[str, Any],
) -> list[np.ndarray]:
    """The pictures of all ranks of the last gang; each gang goes on from the bytes of the one before.

    Args:
        load: a denoiser of a pipeline that `make` has made, with all that `params` names.
        sizes: of the gangs, each for as many steps.
        config: of a ParallelConfig.
    """

    def rank(blob: bytes, until: int, communicator: Communicator) -> tuple[bytes, np.ndarray | None]:
        gang = connect("local") if communicator.world_size == 1 else communicator
        denoiser = load(parallelize(make(), gang, ParallelConfig(**config)))
        state = DenoiseState.from_bytes(blob)
        denoiser.adapt(state)
        while state.step < until:
            denoiser.step(state)
        denoiser.settle(state)
        return state.to_bytes(), drawn(denoiser, state) if state.done else None

    state = load(make()).prepare(params)
    blob = state.to_bytes()
    for index, size in enumerate(sizes, 1):
        ranks = run_in_lockstep(size, partial(rank, blob, state.num_steps * index // len(sizes)))
        blob = ranks[0][0]
    return [image for _, image in ranks]
