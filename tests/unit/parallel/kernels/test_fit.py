"""Triton's fitted weights are torch's: in Triton's interpreter everywhere, compiled where there is a GPU."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from distriray.parallel.kernels import plain
from tests.unit.parallel.kernels.conftest import Run

# Torch's operations round the weight too; the interpreter cuts bfloat16 off.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 3e-2}
WIDE = [2048, 64, 4096 + 8, 0, 8, 5000]  # blocks are of 2048
ODD = [1, 2047, 2050, 3, 0, 77]
ROWS = 2
EDGE = 8


def changing(values: torch.Tensor, parts: list[int], step: int) -> None:
    """Let the values be those of a step: each part has its own size, and its own weight foresees it."""
    generator = torch.Generator().manual_seed(step)
    for number, part in enumerate(part for row in values for part in row.split(parts)):
        ramp = torch.linspace(-1, 1, part.numel())
        noise = torch.randn(part.shape, generator=generator)
        part.copy_(10.0 ** (number % 3) * (ramp * (1 - (0.1 * number) ** step) + 0.01 * noise))


def check_steps(device: str, parts: list[int], dtype: torch.dtype, at_once: int | None) -> None:
    from distriray.parallel.kernels import fused

    if at_once is not None:
        with patch.object(fused.fit, "_SUMS", at_once):
            return check_steps(device, parts, dtype, None)
    width = sum(parts)
    received = torch.zeros((ROWS, EDGE + width + EDGE), dtype=dtype, device=device)[:, EDGE:-EDGE]
    fits = [kernels.Fit(received, parts * ROWS) for kernels in (plain, fused)]
    whole = torch.full((2, 2, EDGE + ROWS * width + EDGE), 7.0, dtype=dtype, device=device)
    kept = whole[..., EDGE:-EDGE].unflatten(-1, (ROWS, width)).zero_()
    for step in range(1, 6):
        changing(received, parts, step)
        for fit, (before, change) in zip(fits, kept, strict=True):
            fit.extrapolate(received, before, change, 0.7)
        everything = torch.cat((kept.flatten(0, 1), received[None])).float()
        for part in everything.split(parts, -1):
            if part.numel():
                foreseen, changes, others, their_changes, now = part / part[-1].abs().max()
                close = {"rtol": 0, "atol": TOLERANCES[dtype]}
                torch.testing.assert_close(others, foreseen, **close)
                torch.testing.assert_close(their_changes, changes, **close)
                assert step < 2 or not torch.equal(others, now)
        kept[:, 0] = received
    assert (whole[..., :EDGE] == 7).all() and (whole[..., -EDGE:] == 7).all()


@pytest.mark.parametrize(
    ("parts", "dtype", "at_once"),
    [
        pytest.param(WIDE, torch.float32, None, id="wide"),
        pytest.param(WIDE, torch.float16, None, id="wide, float16"),
        pytest.param(WIDE, torch.bfloat16, None, id="wide, bfloat16"),
        pytest.param(ODD, torch.float32, None, id="odd"),
        pytest.param(WIDE, torch.float32, 2, id="more blocks than are added up at once"),
    ],
)
def test_either_kernels_foresee_the_same(
    run: Run, parts: list[int], dtype: torch.dtype, at_once: int | None
) -> None:
    run(check_steps, parts, dtype, at_once)


def check_edges(device: str) -> None:
    from distriray.parallel.kernels import fused

    parts = [8, 16, 8, 8]
    for kernels in (plain, fused):
        received = torch.ones((1, 40), device=device)
        before, change = torch.zeros_like(received), torch.zeros_like(received)
        fit = kernels.Fit(received, parts)
        for step in range(1, 5):
            unchanging, wild, back, evenly = received[0].split(parts)
            (
                unchanging.fill_(5.0),
                wild.fill_(float("nan")),
                back.fill_((-1.0) ** step),
                evenly.fill_(3.0 * step),
            )
            fit.extrapolate(received, before, change, 0.7)
            foreseen = before.clone()
            before.copy_(received)
        unchanging, wild, back, evenly = foreseen[0].split(parts)
        assert (unchanging == 5).all() and wild.isnan().all()
        assert (back == 1).all()  # no weight is below zero
        torch.testing.assert_close(evenly, torch.full_like(evenly, 15.0))
        fit.sums.zero_()
        change.zero_()
        fit.extrapolate(received, before, change, 0.7)
        assert torch.equal(before.nan_to_num(), received.nan_to_num())  # nothing is known


def test_what_does_not_change_stays_and_what_is_not_finite_leaves_others_alone(run: Run) -> None:
    run(check_edges)
