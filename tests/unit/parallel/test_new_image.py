"""The start of an image that nobody announces."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from distriray.parallel.new_image import NewImageDetector, Signs
from distriray.parallel.schedules import Moment, Schedules

TEXT = torch.ones((2, 7, 4))


class Pipeline:
    def __init__(self) -> None:
        self.scheduler = SimpleNamespace(timesteps=torch.tensor([900.0, 800.0]))


def signs(detector: NewImageDetector, schedules: Schedules, *timesteps: float) -> list[bool]:
    return [detector.look(schedules.read(timestep), TEXT, None).new_image for timestep in timesteps]


def watching(pipeline: Pipeline) -> Schedules:
    schedules = Schedules()
    schedules.watch(pipeline)
    return schedules


def test_an_image_lasts_while_time_falls() -> None:
    timesteps = (900, 800, 700, 900, 800)
    assert signs(NewImageDetector(), Schedules(), *timesteps) == [True, False, False, True, False]


def test_a_repeated_timestep_is_a_new_image_unless_a_scheduler_says_otherwise() -> None:
    assert signs(NewImageDetector(), Schedules(), 900, 900) == [True, True]
    assert signs(NewImageDetector(), watching(pipeline := Pipeline()), 900, 900, 800) == [True, False, False]
    assert pipeline.scheduler is not None


def test_new_timesteps_are_a_new_image_although_time_falls() -> None:
    detector, pipeline = NewImageDetector(), Pipeline()
    schedules = watching(pipeline)
    assert signs(detector, schedules, 900, 800) == [True, False]
    pipeline.scheduler.timesteps = torch.tensor([700.0])
    assert signs(detector, schedules, 700) == [True]


def test_other_text_is_a_new_image_and_another_scale_only_another_text() -> None:
    detector = NewImageDetector()
    detector.look(Moment(900), TEXT, None)
    assert detector.look(Moment(800), TEXT.clone(), None) == Signs(new_image=False, new_text=False)
    assert detector.look(Moment(700), TEXT.clone(), {"scale": 0.5}) == Signs(new_image=False, new_text=True)
    assert detector.look(Moment(600), 2 * TEXT, {"scale": 0.5}) == Signs(new_image=True, new_text=True)


def test_texts_are_not_compared_where_time_says_that_it_is_a_new_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    detector = NewImageDetector()
    detector.look(Moment(100), TEXT, None)
    monkeypatch.setattr(torch, "equal", lambda *_: pytest.fail("compared"))
    assert detector.look(Moment(900), TEXT.clone(), None) == Signs(new_image=True, new_text=True)
