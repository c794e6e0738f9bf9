"""Numbers of steps: the calls of the network that a scheduler makes of the steps that are asked for."""

from __future__ import annotations

from typing import Literal, NamedTuple

SchedulerName = Literal[
    "ddim",
    "dpmpp-2m",
    "dpmpp-2m-karras",
    "dpmpp-2s",
    "euler",
    "euler-ancestral",
    "heun",
    "lcm",
    "lms",
    "pndm",
    "unipc",
]
"""The names of `distriray.denoise.SCHEDULERS`, here because importing those loads torch and diffusers."""


class StepCount(NamedTuple):
    """Number of network calls by a scheduler: `factor` times the steps that are asked for, and `more`."""

    factor: int = 1
    more: int = 0

    def of(self, steps: int, skipped: int = 0) -> int:
        """Calls in all but the first steps; the last step, and so an only one, is always a single call."""
        return self.factor * (steps - skipped) + self.more if steps > 1 else 1 - skipped


STEP_COUNTS: dict[SchedulerName, StepCount] = {"heun": StepCount(2, -1), "pndm": StepCount(1, 1)}
"""Of the schedulers that do not call the network once a step: heun is of second order, pndm repeats one."""


def guided_steps(guidance_end: float, num_steps: int) -> int:
    """Number of first steps that have guidance, as diffusers' guiders count their `stop`."""
    return int(guidance_end * num_steps)


def is_controlled(step: int, num_steps: int, start: float, end: float) -> bool:
    """Whether a ControlNet takes part in a step, as diffusers' pipelines count shares of the steps."""
    return step / num_steps >= start and (step + 1) / num_steps <= end
