"""What layers read in place of what was sent a step ago."""

from __future__ import annotations

import pytest
import torch

from distriray.config import Weight
from distriray.parallel.exchange.extrapolation import Extrapolation, extrapolation_of

PARTS = [2, 3, 0, 1, 2]
"""Numbers that grow evenly, half as fast from step to step, none, back and forth, and not at all."""


def values(step: int) -> torch.Tensor:
    """Those of a step, (2, 4)."""
    evenly, slower, back = 3.0 * step, 8.0 - 2.0 ** (2 - step), (-1.0) ** step
    return torch.tensor([evenly, -evenly, slower, 2 * slower, slower, back, 5.0, 5.0]).view(2, 4)


def read(of: Extrapolation, received: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """What layers read in each step of an image, from values that all arrived the step before."""
    of.begin()
    readable = []
    for step in range(steps):
        if step:
            of.predict(step)
            readable.append(of.readable.clone())
        of.remember(read=step > 0)
        received.copy_(values(step))
    return readable


def made(weight: Weight) -> tuple[Extrapolation, torch.Tensor]:
    received = torch.zeros(2, 4)
    made = extrapolation_of(received, weight, PARTS)
    assert made is not None
    return made, received


def test_each_part_follows_by_the_weight_that_its_own_changes_ask_for() -> None:
    *_, last = read(*made("fitted"), 6)
    expected = values(5)  # what is read in the last step, if it was foreseen
    torch.testing.assert_close(last.flatten()[:5], expected.flatten()[:5])
    torch.testing.assert_close(last.flatten()[5:], values(4).flatten()[5:])  # no weight is below zero


def test_a_fit_needs_three_steps_and_a_constant_two() -> None:
    fitted, constant = (read(*made(weight), 5) for weight in ("fitted", 0.5))
    assert [torch.equal(each, values(step)) for step, each in enumerate(fitted)] == [True, True, False, False]
    assert [torch.equal(each, values(step)) for step, each in enumerate(constant)] == [
        True,
        False,
        False,
        False,
    ]
    torch.testing.assert_close(constant[3], values(3) + 0.5 * (values(3) - values(2)))


@pytest.mark.parametrize("weight", ["fitted", 0.75])
def test_nothing_is_left_of_the_image_before(weight: Weight) -> None:
    of, received = made(weight)
    first = read(of, received, 6)
    received.fill_(1e6)
    of.remember(read=False)
    assert all(map(torch.equal, first, read(of, received, 6)))


def test_a_wild_part_leaves_the_others_alone() -> None:
    of, received = made("fitted")
    of.begin()
    for step in range(5):  # all of them synchronous
        of.remember(read=False)
        received.copy_(values(step))
        received[0, :2] = 1e10 * (-1) ** step
    of.predict(5)
    torch.testing.assert_close(of.readable.flatten()[2:5], values(5).flatten()[2:5])
    assert of.readable.isfinite().all()


def test_no_weight_is_no_extrapolation() -> None:
    assert extrapolation_of(torch.zeros(2, 4), 0.0, PARTS) is None
