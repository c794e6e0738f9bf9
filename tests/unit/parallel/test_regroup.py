"""One image by changing gangs is the image of one device, or near it."""

from __future__ import annotations

import functools

import pytest
import torch

from distriray import SamplingParams
from distriray.collective import run_in_lockstep
from distriray.denoise import Denoiser
from tests.models import tiny_sdxl
from tests.parameters import sweep
from tests.regroup import DISPLACED, REQUEST, SYNC, changing_gangs

with_schedulers = pytest.mark.parametrize("scheduler", sweep(["dpmpp-2m", "ddim", "euler-ancestral"]))


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
