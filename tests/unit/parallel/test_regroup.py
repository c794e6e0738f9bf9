"""One image by changing gangs is the image of one device, or near it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from bench.exchange import unet_inputs
from distriray import ParallelConfig, SamplingParams, parallelize
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.collective.subgroup import Subgroup
from distriray.denoise import Denoiser
from distriray.parallel import engine_of
from tests.models import tiny_sdxl, tiny_sdxl_unet
from tests.parameters import sweep
from tests.regroup import DISPLACED, REQUEST, SYNC, changing_gangs
from tests.unit.parallel.recorded import RecordedGraphs
from tests.unit.parallel.transformers import TRANSFORMERS, Shape, draw

SPLIT = ParallelConfig(exchange="displaced", warmup_steps=1, cfg_parallel="auto")
NONE = ParallelConfig(exchange="none", cfg_parallel=False)

with_schedulers = pytest.mark.parametrize("scheduler", sweep(["dpmpp-2m", "ddim", "euler-ancestral"]))


class Closing(Subgroup):
    """A whole gang as a gang of its own, which may break alone."""

    broken = False

    def __init__(self, parent: Communicator) -> None:
        super().__init__(parent, range(parent.world_size))


def alone(scheduler: str) -> torch.Tensor:
    denoiser = Denoiser(tiny_sdxl())
    state = denoiser.prepare(SamplingParams(**REQUEST, scheduler=scheduler))
    while not state.done:
        denoiser.step(state)
    return state.latents


@with_schedulers
def test_changing_gangs_in_sync_mode_equal_one_device(scheduler: str) -> None:
    rank = functools.partial(changing_gangs, config=SYNC, scheduler=scheduler)
    latents, _ = run_in_lockstep(4, rank)[0]
    reference = alone(scheduler)
    assert (latents - reference).abs().max() <= 1e-4 * reference.abs().max()


@with_schedulers
def test_changing_gangs_in_displaced_mode_start_with_one_fresh_step(scheduler: str) -> None:
    rank = functools.partial(changing_gangs, config=DISPLACED, scheduler=scheduler)
    latents, fresh = run_in_lockstep(4, rank)[0]
    assert fresh[:6] == [True, False, False, True, False, False], "each gang's first step, and no other"
    reference = alone(scheduler)
    assert latents.isfinite().all()
    assert (latents - reference).norm() <= 0.3 * reference.norm()


@pytest.mark.parametrize("config", [SYNC, DISPLACED, SPLIT, NONE], ids=["sync", "displaced", "split", "none"])
def test_a_gang_that_is_joined_again_finds_what_it_left(config: ParallelConfig) -> None:
    """Buffers and captured steps: the last tour through the gangs makes none, and draws what others drew."""

    def rank(communicator: Communicator) -> list[torch.Tensor]:
        pipeline = parallelize(tiny_sdxl(), connect("local"), config)
        denoiser, engine, maker = Denoiser(pipeline), engine_of(pipeline), RecordedGraphs()
        assert engine is not None
        engine.capture_with(maker)
        first = communicator.rank // 2 * 2
        pairs = [communicator.subgroup(ranks) for ranks in ([first, first + 1], [first + 1, first])]
        gangs = [communicator, *pairs, connect("local")]
        tours, made, held = [], [], []
        for _ in range(4):
            state = denoiser.prepare(SamplingParams(**REQUEST))
            for gang in gangs:
                parallelize(pipeline, gang, config)
                for _ in range(2):
                    denoiser.step(state)
            tours.append(state.latents)
            made.append(len(maker.made))
            held.append(engine.buffer_bytes)
        assert made[0] < made[2] == made[3] and all(graph.replays for graph in maker.made)
        assert held[2] == held[3]
        assert all(torch.equal(latents, tours[0]) for latents in tours)
        engine.capture_with(None)
        assert engine.buffer_bytes == 0
        return tours

    found = run_in_lockstep(4, rank)
    assert all(torch.equal(tours[0], found[0][0]) for tours in found)


def test_steps_of_one_rank_are_not_taken_for_those_of_another() -> None:
    """Networks of tokens are given whole inputs, and cut them to the rank within what is captured."""

    def rank(communicator: Communicator) -> None:
        flux = TRANSFORMERS["flux"]
        network = parallelize(flux.make(), communicator, NONE)
        engine, maker = engine_of(network), RecordedGraphs()
        assert engine is not None
        engine.capture_with(maker)
        expected = [draw(network, flux, Shape()) for _ in range(3)][0]
        parallelize(network, communicator.subgroup([1, 0]), NONE)
        for _ in range(3):
            assert all(map(torch.equal, draw(network, flux, Shape()), expected))
        assert all(graph.replays for graph in maker.made)

    run_in_lockstep(2, rank)


def test_what_is_kept_of_other_gangs_is_bounded_and_ends_with_them() -> None:
    def rank(communicator: Communicator) -> None:
        pipeline = parallelize(tiny_sdxl(), connect("local"))
        denoiser, engine = Denoiser(pipeline), engine_of(pipeline)
        assert engine is not None

        def draw(gang: Communicator, **changed: Any) -> int:
            """Bytes of buffers after two images."""
            parallelize(pipeline, gang, DISPLACED.model_copy(update=changed))
            for _ in range(2):
                state = denoiser.prepare(SamplingParams(**REQUEST))
                while not state.done:
                    denoiser.step(state)
            return engine.buffer_bytes

        pair = communicator.subgroup([0, 1] if communicator.rank < 2 else [2, 3])
        whole = draw(communicator)
        both = draw(pair)
        assert both > whole
        assert draw(communicator, max_buffer_bytes=0) == whole
        draw(pair)
        engine.give_back()
        assert engine.buffer_bytes == both - whole
        closed = Closing(communicator)
        assert draw(closed) == both
        closed.broken = True
        assert draw(pair) == both - whole

    run_in_lockstep(4, rank)


def test_networks_that_one_gang_in_lockstep_after_the_other_has_keep_the_last_ones_buffers() -> None:
    networks = [tiny_sdxl_unet() for _ in range(2)]

    def rank(communicator: Communicator) -> int:
        network = parallelize(networks[communicator.rank], communicator, DISPLACED)
        engine = engine_of(network)
        assert engine is not None
        with engine.image():
            for step in range(2):
                network(timestep=900 - step, **unet_inputs(network, 256))
        return engine.buffer_bytes

    first, *later = (run_in_lockstep(2, rank) for _ in range(3))
    assert min(first) > 0 and later == [first, first]
