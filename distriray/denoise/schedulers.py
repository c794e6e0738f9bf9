"""Schedulers by name: those that a request may name, which a saved state may bring back."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from distriray.errors import InvalidRequest
from distriray.steps import SchedulerName, StepCount


class SchedulerChoice(NamedTuple):
    kind: type[Any]
    options: dict[str, Any]


# The SDE solvers with Brownian noise are left out: they draw from a tree that is no part of a state.
SCHEDULERS: dict[SchedulerName, SchedulerChoice] = {
    "ddim": SchedulerChoice(DDIMScheduler, {"clip_sample": False}),
    "dpmpp-2m": SchedulerChoice(DPMSolverMultistepScheduler, {}),
    "dpmpp-2m-karras": SchedulerChoice(DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpmpp-2s": SchedulerChoice(DPMSolverSinglestepScheduler, {}),
    "euler": SchedulerChoice(EulerDiscreteScheduler, {}),
    "euler-ancestral": SchedulerChoice(EulerAncestralDiscreteScheduler, {}),
    "heun": SchedulerChoice(HeunDiscreteScheduler, {}),
    "lcm": SchedulerChoice(LCMScheduler, {}),
    "lms": SchedulerChoice(LMSDiscreteScheduler, {}),
    "pndm": SchedulerChoice(PNDMScheduler, {"skip_prk_steps": True}),
    "unipc": SchedulerChoice(UniPCMultistepScheduler, {}),
}
"""By a noise schedule."""

_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
FLOW_SCHEDULERS: dict[SchedulerName, SchedulerChoice] = {
    "dpmpp-2m": SchedulerChoice(DPMSolverMultistepScheduler, _FLOW),
    "euler": SchedulerChoice(FlowMatchEulerDiscreteScheduler, {}),
    "heun": SchedulerChoice(FlowMatchHeunDiscreteScheduler, {}),
    "unipc": SchedulerChoice(UniPCMultistepScheduler, _FLOW),
}
"""By flow matching."""

_CLASSES = {c.kind.__name__: c.kind for table in (SCHEDULERS, FLOW_SCHEDULERS) for c in table.values()}


def make_scheduler(model_scheduler: SchedulerMixin, name: SchedulerName | None) -> Any:
    """A scheduler of a request's own, with the model's noise schedule or, by flow matching, its shift.

    Raises:
        InvalidRequest: the model's own cannot be part of a state, or there is none of that name of its kind.
    """
    config = dict(model_scheduler.config)
    if name is None:
        # Else what a pipeline set is lost, where the scheduler's file says nothing of it.
        config.pop("_use_default_values", None)
        return scheduler_class(type(model_scheduler).__name__).from_config(config)
    if not follows_flow(model_scheduler):
        kind, options = SCHEDULERS[name]
        return kind.from_config(config, **options)
    if name not in FLOW_SCHEDULERS:
        raise InvalidRequest(
            f"scheduler {name} is not for flow matching; use {', '.join(FLOW_SCHEDULERS)}", "scheduler"
        )
    kind, options = FLOW_SCHEDULERS[name]
    shift = config.get("shift", config.get("flow_shift", 1.0))
    return kind.from_config(config, **options, **{"flow_shift" if options else "shift": shift})


def follows_flow(scheduler: Any) -> bool:
    """Whether a scheduler goes by flow matching: latents are a mean of picture and noise."""
    kinds = FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
    return isinstance(scheduler, kinds) or bool(scheduler.config.get("use_flow_sigmas", False))


def step_count(model_scheduler: SchedulerMixin) -> StepCount:
    """Network calls by a model's own scheduler, from how many timesteps it makes of some steps."""
    few, many = 8, 16
    scheduler = deepcopy(model_scheduler)
    made = []
    for steps in (few, many):
        try:
            scheduler.set_timesteps(steps)
        except ValueError:  # flow matching that is shifted by the picture's size; it is of first order
            return StepCount()
        made.append(len(scheduler.timesteps))
    factor = (made[1] - made[0]) // (many - few)
    return StepCount(factor, made[0] - factor * few)


def scheduler_class(name: str) -> type[Any]:
    """The class of that name, if a state may hold one; raises InvalidRequest."""
    if name not in _CLASSES:
        raise InvalidRequest(
            f"scheduler {name} cannot be part of a state; there are {', '.join(sorted(SCHEDULERS))}",
            "scheduler",
        )
    return _CLASSES[name]
