"""The start of an image that nobody announces."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from distriray.parallel.new_image import NewImageDetector, Signs

TEXT = torch.ones((2, 7, 4))


class Pipeline:
    def __init__(self) -> None:
        self.scheduler = SimpleNamespace(timesteps=torch.tensor([900.0, 800.0]))


def signs(detector: NewImageDetector, *timesteps: float) -> list[bool]:
    return [detector.look(timestep, TEXT, None).new_image for timestep in timesteps]


def test_an_image_lasts_while_time_falls() -> None:
    assert signs(NewImageDetector(), 900, 800, 700, 900, 800) == [True, False, False, True, False]


def test_a_repeated_timestep_is_a_new_image_unless_a_scheduler_says_otherwise() -> None:
    assert signs(NewImageDetector(), 900, 900) == [True, True]
    detector, pipeline = NewImageDetector(), Pipeline()
    detector.watch(pipeline)
    assert signs(detector, 900, 900, 800) == [True, False, False]


def test_new_timesteps_are_a_new_image_although_time_falls() -> None:
    detector, pipeline = NewImageDetector(), Pipeline()
    detector.watch(pipeline)
    assert signs(detector, 900, 800) == [True, False]
    pipeline.scheduler.timesteps = torch.tensor([700.0])
    assert signs(detector, 700) == [True]


def test_other_text_is_a_new_image_and_another_scale_only_another_text() -> None:
    detector = NewImageDetector()
    detector.look(900, TEXT, None)
    assert detector.look(800, TEXT.clone(), None) == Signs(new_image=False, new_text=False)
    assert detector.look(700, TEXT.clone(), {"scale": 0.5}) == Signs(new_image=False, new_text=True)
    assert detector.look(600, 2 * TEXT, {"scale": 0.5}) == Signs(new_image=True, new_text=True)
