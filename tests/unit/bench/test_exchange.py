"""A step of a mode is timed where it does all that later ones do."""

from __future__ import annotations

from typing import Any

import pytest

from bench.exchange import _time_mode
from distriray.collective import LockstepCommunicator, run_in_lockstep
from distriray.parallel.kernels import plain
from tests.models import tiny_sdxl_unet


def test_a_step_that_is_timed_fits_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = 0
    extrapolate = plain.Fit.extrapolate

    def count_fit(*given: Any) -> None:
        nonlocal fits
        fits += 1
        extrapolate(*given)

    monkeypatch.setattr(plain.Fit, "extrapolate", count_fit)

    def time(communicator: LockstepCommunicator) -> float:
        return _time_mode(tiny_sdxl_unet(), communicator, "displaced", 256, steps=1).step_s

    assert all(seconds > 0 for seconds in run_in_lockstep(2, time))
    assert fits
