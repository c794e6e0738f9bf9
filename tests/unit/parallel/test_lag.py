"""What becomes of flags, and of a broken gang, where the host is a step ahead of its device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, run_in_lockstep
from distriray.collective.absent import AbsentPeers
from distriray.denoise import Denoiser, DenoiseState
from distriray.errors import GangBroken, GenerationCancelled, UnsupportedModel
from distriray.parallel import engine_of
from distriray.parallel.engine import Engine
from distriray.requests import SamplingParams
from tests.models import tiny_sdxl

PARAMS = SamplingParams(
    prompt="a", seed=0, height=128, width=64, num_inference_steps=6, scheduler="euler-ancestral"
)
CONFIG = ParallelConfig(exchange="displaced", warmup_steps=1, cfg_parallel=False)
DRIFT = 5.0  # so that a network of random weights gets warm


def begin(communicator: Communicator, lags: bool = True) -> tuple[Denoiser, Engine, DenoiseState]:
    pipeline = parallelize(tiny_sdxl(), communicator, CONFIG)
    denoiser, engine = Denoiser(pipeline), engine_of(pipeline)
    assert engine is not None
    engine.lags = lags
    return denoiser, engine, denoiser.prepare(PARAMS)


@pytest.mark.parametrize(("lags", "yields_after"), [(False, 3), (True, 4)])
def test_all_ranks_yield_after_the_same_step(lags: bool, yields_after: int) -> None:
    def rank(communicator: Communicator) -> int:
        denoiser, engine, state = begin(communicator, lags)
        while not engine.yielding:
            if state.step == 2 and communicator.rank == 1:
                engine.ask_yield()
            denoiser.step(state)
        denoiser.settle(state)
        return state.step

    assert run_in_lockstep(2, rank) == [yields_after] * 2


@pytest.mark.parametrize(("lags", "done"), [(False, 2), (True, 3)])
def test_a_cancelled_step_raises_on_all_ranks(lags: bool, done: int) -> None:
    def rank(communicator: Communicator) -> int:
        denoiser, engine, state = begin(communicator, lags)
        with pytest.raises(GenerationCancelled):
            while not state.done:
                if state.step == 2 and communicator.rank == 1:
                    engine.ask_cancel()
                denoiser.step(state)
        return state.step

    assert run_in_lockstep(2, rank) == [done] * 2


def test_a_lag_changes_no_picture() -> None:
    def rank(communicator: Communicator) -> list[torch.Tensor]:
        finals = []
        for lags in (False, True):
            denoiser, engine, state = begin(communicator, lags)
            unsettled = 0
            while not state.done:
                denoiser.step(state)
                unsettled += state.unsettled is not None
            assert unsettled == (5 if lags else 0) and engine.settled
            finals.append(state.latents)
        return finals

    for at_once, later in run_in_lockstep(2, rank):
        assert torch.equal(at_once, later)


@pytest.mark.parametrize("leaves", ["step", "settle", "other"])
def test_what_an_aborted_transfer_left_is_forgotten(leaves: str) -> None:
    peers = AbsentPeers(0, 2, torch.device("cpu"))
    denoiser, _, state = begin(peers)
    for _ in range(3):
        denoiser.step(state)
    denoiser.settle(state)
    good = state.to_bytes()
    denoiser.step(state)
    with pytest.raises(RuntimeError, match="settle"):
        state.to_bytes()
    peers.abort()
    with pytest.raises(GangBroken):
        if leaves == "step":
            denoiser.step(state)
        elif leaves == "settle":
            denoiser.settle(state)
        else:
            denoiser.step(denoiser.prepare(PARAMS))
    assert state.step == 3 and state.to_bytes() == good


def test_a_cancel_is_not_lost_where_each_call_begins_anew() -> None:
    """Calls for the same timestep, of two regions, with nobody to say so."""

    def rank(communicator: Communicator) -> int:
        config = ParallelConfig(exchange="sync", cfg_parallel=False)
        pipeline = parallelize(tiny_sdxl(), communicator, config)
        engine, calls = engine_of(pipeline), 0
        assert engine is not None
        engine.lags = True
        pipeline.scheduler.set_timesteps(4)
        with pytest.raises(GenerationCancelled):
            for timestep in pipeline.scheduler.timesteps:
                for region in range(2):
                    if calls == 4 and communicator.rank == 1:
                        engine.ask_cancel()
                    _call(pipeline.unet, timestep, region)
                    calls += 1
        return calls

    assert run_in_lockstep(2, rank) == [5, 5]


@pytest.mark.parametrize("wish", ["yield", "cancel"])
def test_what_was_asked_in_an_image_that_an_error_ended_is_not_asked_of_the_next(wish: str) -> None:
    """Also if one rank keeps the error, and with it the image, while the other does not."""

    def rank(communicator: Communicator) -> tuple[bool, bool]:
        pipeline = parallelize(tiny_sdxl(), communicator, CONFIG)
        engine = engine_of(pipeline)
        assert engine is not None
        engine.lags = True
        pipeline.scheduler.set_timesteps(6)

        def draw(steps: int) -> None:
            with engine.image() as image:  # noqa: F841 - the error's frames hold it
                for step, timestep in enumerate(pipeline.scheduler.timesteps):
                    if step == steps:
                        raise KeyError("a callback's own")
                    if step == steps - 1 and steps < 6 and communicator.rank == 1:
                        engine.ask_yield() if wish == "yield" else engine.ask_cancel()
                    _call(pipeline.unet, timestep, 0)

        with pytest.raises(KeyError) as raised:
            draw(steps=3)
        unsettled = not engine.settled
        if communicator.rank == 1:
            del raised
        draw(steps=6)
        return unsettled, engine.yielding

    assert run_in_lockstep(2, rank) == [(True, False)] * 2


def _call(unet: Any, timestep: torch.Tensor, region: int, **further: Any) -> None:
    added = {"text_embeds": torch.ones((1, 16)), "time_ids": torch.ones((1, 6))}
    sample, text = torch.full((1, 4, 16, 8), float(region)), torch.full((1, 7, 32), float(region))
    unet(sample, timestep, encoder_hidden_states=text, added_cond_kwargs=added, **further)


def test_a_promise_that_more_follow_is_of_one_call_also_where_that_is_refused() -> None:
    pipeline = parallelize(tiny_sdxl(), AbsentPeers(0, 2, torch.device("cpu")), CONFIG)
    engine = engine_of(pipeline)
    assert engine is not None
    engine.lags = True
    engine.announce_more()
    with pytest.raises(UnsupportedModel, match="attention_mask"):
        _call(pipeline.unet, torch.tensor(7.0), 0, attention_mask=torch.ones(1, 32))
    _call(pipeline.unet, torch.tensor(7.0), 0)
    assert engine.settled
    engine.announce_more()
    _call(pipeline.unet, torch.tensor(7.0), 0)
    assert not engine.settled


def test_halves_of_a_gang_that_exchange_nothing_within_a_step_lag_too() -> None:
    def rank(communicator: Communicator) -> bool:
        pipeline = parallelize(tiny_sdxl(), communicator)
        denoiser, engine = Denoiser(pipeline), engine_of(pipeline)
        assert engine is not None
        engine.lags = True
        state = denoiser.prepare(PARAMS)
        denoiser.step(state)
        return engine.settled

    assert run_in_lockstep(2, rank) == [False, False]


def test_the_last_step_of_an_image_is_known_to_be_whole() -> None:
    peers = AbsentPeers(0, 2, torch.device("cpu"))
    denoiser, _, state = begin(peers)
    while state.step < state.num_steps - 1:
        denoiser.step(state)
    denoiser.settle(state)
    good = state.to_bytes()
    peers.abort()
    with pytest.raises(GangBroken):
        denoiser.step(state)
    assert state.to_bytes() == good


def test_drift_ends_the_warm_up_at_the_same_step_with_a_lag() -> None:
    def rank(communicator: Communicator, lags: bool) -> list[Any]:
        pipeline = parallelize(
            tiny_sdxl(),
            communicator,
            ParallelConfig(
                exchange="displaced", warmup_steps="auto", auto_warmup_drift=DRIFT, cfg_parallel=False
            ),
        )
        denoiser, engine = Denoiser(pipeline), engine_of(pipeline)
        assert engine is not None
        engine.lags = lags
        state = denoiser.prepare(PARAMS)
        steps = []
        while not state.done:
            denoiser.step(state)
            steps.append((engine.statistics.synchronous, engine.drift if engine.settled else None))
        return [synchronous for synchronous, _ in steps] + [steps[1][1]]

    at_once = run_in_lockstep(2, lambda communicator: rank(communicator, False))
    later = run_in_lockstep(2, lambda communicator: rank(communicator, True))
    assert at_once == later
    assert True in at_once[0][:-1] and False in at_once[0][:-1]
