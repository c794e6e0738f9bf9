"""A step launches its work and reads nothing of it: on a GPU each read would be a full stop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import distriray.parallel.gather
from distriray import ParallelConfig, parallelize
from distriray.collective.absent import AbsentPeers
from distriray.config import PAPER, WHOLE_AT_FIRST
from distriray.denoise import SCHEDULERS, Denoiser
from distriray.parallel import engine_of
from distriray.parallel.gather import HeaderOnItsWay
from distriray.parallel.networks.registry import denoising_module
from distriray.requests import SamplingParams
from tests.models import SHALLOW, tiny_flux, tiny_flux2, tiny_qwen_image, tiny_sd3, tiny_sdxl, tiny_z_image
from tests.parameters import sweep
from tests.unit.parallel.stand_in import DEVICE, OnDevice, StandIn

STEPS = 5

LEFT = {"euler-ancestral": 1, "lcm": 1, "unipc": 7}
"""Stops in a step that are diffusers' own: the host's generators draw its noise, UniPC solves a system."""


tiny_shallow_sdxl = partial(tiny_sdxl, **SHALLOW)


class LateHeader(HeaderOnItsWay):
    """A header that has come once another one was sent off."""

    newest: LateHeader | None = None

    def __init__(self, communicator: Any, values: torch.Tensor) -> None:
        super().__init__(communicator, values)
        LateHeader.newest = self

    def read(self) -> Any:
        if isinstance(self._values, OnDevice) and LateHeader.newest is not self:
            self._values = self._values.inner
        return super().read()


@pytest.mark.parametrize("exchange", sweep(["displaced_attention", "sync", PAPER, "compressed"], first=2))
def test_a_step_stops_no_device(monkeypatch: pytest.MonkeyPatch, exchange: Any) -> None:
    assert _stops(monkeypatch, ParallelConfig(warmup_steps=1, exchange=exchange)) == 0


@pytest.mark.parametrize(
    "make", sweep([tiny_qwen_image, tiny_flux, tiny_sd3, tiny_z_image, tiny_flux2], first=2)
)
@pytest.mark.parametrize("interval", [1, 2])
def test_a_step_of_a_transformer_stops_no_device(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any], interval: int
) -> None:
    assert _stops(monkeypatch, ParallelConfig(cache_interval=interval), make=make) == 0


@pytest.mark.parametrize("scheduler", sweep(sorted(SCHEDULERS)))
def test_no_scheduler_stops_the_device(monkeypatch: pytest.MonkeyPatch, scheduler: Any) -> None:
    stops = _stops(monkeypatch, ParallelConfig(exchange="displaced", warmup_steps=1), scheduler)
    assert stops == LEFT.get(scheduler, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    ("scheduler", "exchange"),
    [
        *((scheduler, "displaced") for scheduler in sorted(set(SCHEDULERS) - set(LEFT))),
        ("euler", "sync"),
        ("euler", "compressed"),
    ],
)
def test_a_gpu_is_not_stopped(scheduler: Any, exchange: Any) -> None:
    device = torch.device("cuda", 0)
    pipeline = tiny_sdxl().to(device)
    denoiser, peers = Denoiser(pipeline), AbsentPeers(0, 4, device)
    engine = engine_of(parallelize(pipeline, peers, ParallelConfig(exchange=exchange, warmup_steps=2)))
    assert engine is not None and engine.lags
    params = SamplingParams(
        prompt="a", seed=0, height=256, width=256, num_inference_steps=STEPS, scheduler=scheduler
    )
    state = denoiser.prepare(params)
    while state.step + 1 < state.num_steps:
        peers.fills = state.step == 0
        torch.cuda.set_sync_debug_mode("error" if state.step > 3 else "default")
        try:
            denoiser.step(state)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert engine.statistics.synchronous == (exchange == "sync") and not engine.settled
    denoiser.step(state)
    assert engine.settled and state.latents.isfinite().all() and engine.statistics.seconds > 0.0


def test_a_pipelines_timesteps_are_read_once_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distriray.parallel.gather, "HeaderOnItsWay", LateHeader)
    pipeline = tiny_sdxl()
    with StandIn() as device:
        device.take(pipeline.unet)
        peers = AbsentPeers(0, 2, DEVICE)
        engine = engine_of(parallelize(pipeline, peers, ParallelConfig(exchange="displaced", warmup_steps=1)))
        assert engine is not None
        engine.lags = True
        pipeline.scheduler.set_timesteps(STEPS)
        pipeline.scheduler.timesteps = pipeline.scheduler.timesteps.to(DEVICE)
        sample = torch.ones((1, 4, 16, 8)).to(DEVICE)
        text = torch.ones((1, 7, 32)).to(DEVICE)
        added = {"text_embeds": torch.ones((1, 16)).to(DEVICE), "time_ids": torch.ones((1, 6)).to(DEVICE)}
        stops = []
        for timestep in pipeline.scheduler.timesteps:
            device.stops.clear()
            pipeline.unet(sample, timestep, encoder_hidden_states=text, added_cond_kwargs=added)
            stops.append(len(device.stops))
    assert stops[1:-1] == [0] * (STEPS - 2)
    assert stops[-1] == 1 and engine.settled  # the last one waits to be known to be whole


def _stops(
    monkeypatch: pytest.MonkeyPatch,
    config: ParallelConfig,
    scheduler: Any = None,
    make: Callable[[], Any] = tiny_shallow_sdxl,
) -> int:
    """The most stops in a step of an image but its first two and its last, which ends it and reads."""
    monkeypatch.setattr(distriray.parallel.gather, "HeaderOnItsWay", LateHeader)
    pipeline = make()
    denoiser = Denoiser(pipeline)
    params = SamplingParams(
        prompt="a", seed=0, height=128, width=128, num_inference_steps=STEPS, scheduler=scheduler
    )
    state = denoiser.prepare(params)
    stops: list[list[str]] = []
    with StandIn() as device:
        device.take(denoising_module(pipeline))
        peers = AbsentPeers(0, 4, DEVICE)
        engine = engine_of(parallelize(pipeline, peers, config))
        assert engine is not None
        engine.lags = True
        state.to(DEVICE)
        while state.step + 1 < state.num_steps:
            peers.fills = state.step == 0
            device.stops.clear()
            denoiser.step(state)
            assert isinstance(state.latents, OnDevice) and not engine.settled
            if state.step > 1:
                stops.append(device.stops.copy())
                in_turn = config.cache_interval > 1 and state.step > WHOLE_AT_FIRST
                assert engine.statistics.synchronous == (engine.exchange == "sync" and not in_turn)
        denoiser.step(state)
        assert engine.settled and state.unsettled is None
    assert len(stops) >= STEPS - 2
    print(*max(stops, key=len), sep="\n")  # pytest shows it with a failure
    return max(map(len, stops))
