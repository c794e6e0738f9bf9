"""Timesteps of a schedule are known by where they lie, and their numbers from one look at the whole."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distriray.parallel.schedules import Element, Moment, Schedules, Turn
from tests.unit.parallel.stand_in import DEVICE, StandIn


class Pipeline:
    def __init__(self, *timesteps: float) -> None:
        self.scheduler = SimpleNamespace(timesteps=torch.tensor(timesteps))


def watching(pipeline: Any) -> Schedules:
    schedules = Schedules()
    schedules.watch(pipeline)
    return schedules


def read(schedules: Schedules, timestep: Any) -> Moment:
    return schedules.read(timestep)._replace(element=None)


def test_the_numbers_of_a_schedule_are_known_without_reading_an_element() -> None:
    pipeline = Pipeline(900.5, 800.0, 700.0)
    schedules, timesteps = watching(pipeline), pipeline.scheduler.timesteps
    assert read(schedules, timesteps[0]) == Moment(900.5, more_follow=True, num_steps=3)
    timesteps.fill_(-1.0)  # what was read once is not read again
    assert read(schedules, timesteps[1]) == Moment(800.0, more_follow=True, num_steps=3)
    assert read(schedules, timesteps[1:][0].expand(4)) == Moment(800.0, more_follow=True, num_steps=3)
    assert read(schedules, timesteps[2]) == Moment(700.0, more_follow=False, num_steps=3)
    pipeline.scheduler.timesteps = torch.tensor([3.0])
    assert read(schedules, pipeline.scheduler.timesteps[0]) == Moment(3.0, num_steps=1)


@pytest.mark.parametrize("timestep", [5, 5.0, torch.tensor(5), torch.tensor([5.0, 5.0])])
def test_other_timesteps_are_read_and_nothing_is_said_of_what_follows(timestep: Any) -> None:
    for schedules in (Schedules(), watching(Pipeline(5.0, 4.0)), watching(Unscheduled())):
        assert read(schedules, timestep) == Moment(5.0)


def test_elements_follow_each_other_within_one_tensor() -> None:
    timesteps, others = torch.tensor([900, 800, 800, 700]), torch.tensor([900, 800, 700])

    def element(timestep: torch.Tensor) -> Element:
        found = Schedules().read(timestep).element
        assert found is not None
        return found

    elements = [element(timestep) for timestep in timesteps]
    assert [later.follows(earlier) for earlier, later in pairwise(elements)] == [True] * 3
    assert elements[1] == element(timesteps[1:][0]) == element(timesteps[1].expand(4)) != elements[2]
    assert not elements[2].follows(elements[0]) and not elements[0].follows(elements[1])
    assert not element(others[1]).follows(elements[0]) and element(others[0]) != elements[0]
    for several in (timesteps[:2], 5, 5.0):
        assert Schedules().read(several).element is None


def test_a_timestep_that_was_divided_is_known_by_the_step_that_its_scheduler_is_at() -> None:
    pipeline = Pipeline(900.0, 600.0, 300.0)
    scheduler = pipeline.scheduler
    scheduler.step_index, scheduler.config = None, SimpleNamespace(num_train_timesteps=1000)
    scheduler.num_inference_steps = 3
    schedules = watching(pipeline)
    moments = []
    for index, timestep in enumerate(scheduler.timesteps):
        moments.append(schedules.read(timestep.expand(2) / 1000))
        scheduler.step_index = index + 1
    assert [moment.timestep for moment in moments] == [900.0, 600.0, 300.0]
    assert [moment.more_follow for moment in moments] == [True, True, False]
    first, second, third = (moment.element for moment in moments)
    assert first is not None and second is not None and third is not None
    assert second.follows(first) and third.follows(second) and not third.follows(first)
    scheduler.timesteps, scheduler.step_index = scheduler.timesteps.clone(), 1
    other = schedules.read(torch.tensor([0.6, 0.6])).element
    assert other is not None and not other.follows(first) and other != second, "of the next image"


def test_a_scheduler_that_others_move_says_nothing_of_a_timestep() -> None:
    pipeline = Pipeline(900.0, 600.0)
    pipeline.scheduler.config = SimpleNamespace(num_train_timesteps=1000)
    pipeline.scheduler.step_index = pipeline.scheduler.num_inference_steps = None
    schedules = watching(pipeline)
    idle = schedules.read(torch.tensor([0.9])).element
    assert isinstance(idle, Element), "it has been given no steps"
    pipeline.scheduler.num_inference_steps = 2
    first, again = (schedules.read(torch.tensor([0.9])).element for _ in range(2))
    assert first is not None and first == again, "it has not moved: another region of the same step"
    for number in (0.5, 500.0, 0.0):
        found = schedules.read(torch.tensor([number])).element
        assert isinstance(found, Element) and not found.follows(first)


def test_a_call_of_another_branch_is_read_until_it_was_one_of_the_schedule() -> None:
    pipeline = Pipeline(900.0, 600.0, 300.0)
    scheduler = pipeline.scheduler
    scheduler.config, scheduler.num_inference_steps = SimpleNamespace(num_train_timesteps=1000), 3
    schedules, stops = watching(pipeline), []
    with StandIn() as device:
        for scheduler.step_index, number in enumerate((0.9, 0.6, 0.3)):
            for branch, timestep in (("cond", number), ("uncond", number), ("probe", 0.001), (None, number)):
                device.stops.clear()
                element = schedules.read(torch.full((1,), timestep, device=DEVICE), branch).element
                stops.append(len(device.stops))
                assert isinstance(element, Turn) == (branch != "probe")
    assert stops == [0, 1, 2, 1, *(0, 0, 2, 1) * 2]


def test_of_two_schedulers_at_one_timestep_neither_is_taken_for_the_one_in_use() -> None:
    pipelines = Pipeline(900.0, 600.0), Pipeline(900.0, 600.0)
    schedules = Schedules()
    for pipeline in pipelines:
        pipeline.scheduler.config = SimpleNamespace(num_train_timesteps=1000)
        pipeline.scheduler.step_index, pipeline.scheduler.num_inference_steps = 1, 2
        schedules.watch(pipeline)
    assert isinstance(schedules.read(torch.tensor([0.6])).element, Element)
    pipelines[1].scheduler = pipelines[0].scheduler  # as `from_pipe` makes them
    assert isinstance(schedules.read(torch.tensor([0.6])).element, Turn)


class Unscheduled:
    """A pipeline that has none."""
