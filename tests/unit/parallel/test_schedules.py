"""Timesteps of a schedule are known by where they lie, and their numbers from one look at the whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distriray.parallel.schedules import Moment, Schedules


class Pipeline:
    def __init__(self, *timesteps: float) -> None:
        self.scheduler = SimpleNamespace(timesteps=torch.tensor(timesteps))


def watching(pipeline: Any) -> Schedules:
    schedules = Schedules()
    schedules.watch(pipeline)
    return schedules


def test_the_numbers_of_a_schedule_are_known_without_reading_an_element() -> None:
    pipeline = Pipeline(900.5, 800.0, 700.0)
    schedules, timesteps = watching(pipeline), pipeline.scheduler.timesteps
    assert schedules.read(timesteps[0]) == Moment(900.5, more_follow=True, renewed=True, num_steps=3)
    timesteps.fill_(-1.0)  # what was read once is not read again
    second = Moment(800.0, more_follow=True, renewed=False, num_steps=3)
    assert schedules.read(timesteps[1]) == second
    assert schedules.read(timesteps[1:][0].expand(4)) == second
    assert schedules.read(timesteps[2]) == Moment(700.0, more_follow=False, renewed=False, num_steps=3)
    pipeline.scheduler.timesteps = torch.tensor([3.0])
    assert schedules.read(pipeline.scheduler.timesteps[0]) == Moment(3.0, renewed=True, num_steps=1)


@pytest.mark.parametrize("timestep", [5, 5.0, torch.tensor(5), torch.tensor([5.0, 5.0])])
def test_other_timesteps_are_read_and_nothing_is_said_of_what_follows(timestep: Any) -> None:
    assert Schedules().read(timestep) == Moment(5.0)
    assert watching(Pipeline(5.0, 4.0)).read(timestep) == Moment(5.0, renewed=True)
    assert watching(Unscheduled()).read(timestep) == Moment(5.0, renewed=False)


class Unscheduled:
    """A pipeline that has none."""
