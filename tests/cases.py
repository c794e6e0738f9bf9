"""Pipeline calls that the engine's tests make on every rank, and by diffusers alone for comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator
from distriray.parallel import StepStatistics, engine_of
from tests.models import tiny_sd15, tiny_sdxl

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-ancestral": EulerAncestralDiscreteScheduler,
    "dpmpp-2m": DPMSolverMultistepScheduler,
    "heun": HeunDiscreteScheduler,
}
PIPELINES = {"sdxl": tiny_sdxl, "sd15": tiny_sd15}


@dataclass(frozen=True)
class Case:
    """One pipeline call."""

    model: str = "sdxl"
    height: int = 128
    width: int = 96
    images: int = 1
    guidance: float = 5.0
    steps: int = 4
    scheduler: str = "ddim"
    config: dict[str, Any] = field(default_factory=dict, hash=False)
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        name = f"{self.model} {self.height}x{self.width} n={self.images} g={self.guidance} {self.scheduler}"
        return f"{name} {self.config} {sorted(self.extra)}"


@dataclass(frozen=True)
class Outcome:
    latents: torch.Tensor
    statistics: StepStatistics
    buffer_bytes: int


def call(pipeline: Any, case: Case) -> torch.Tensor:
    """The latents of a case, (images, 4, height / 8, width / 8)."""
    kind = SCHEDULERS[case.scheduler]
    # Clipping would turn the random network's rounding errors into large ones.
    options = {"clip_sample": False} if kind is DDIMScheduler else {}
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **options)
    return pipeline(
        "a lake at dusk",
        height=case.height,
        width=case.width,
        num_inference_steps=case.steps,
        guidance_scale=case.guidance,
        num_images_per_prompt=case.images,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        **case.extra,
    ).images


def alone(case: Case) -> torch.Tensor:
    """The reference: diffusers by itself."""
    return call(PIPELINES[case.model](), case)


def together(communicator: Communicator, cases: list[Case]) -> list[Outcome]:
    """One rank's results; a pipeline serves all cases, whatever their shapes and configurations."""
    pipelines = {model: PIPELINES[model]() for model in {case.model for case in cases}}
    outcomes = []
    for case in cases:
        pipeline = parallelize(pipelines[case.model], communicator, ParallelConfig(**case.config))
        latents = call(pipeline, case)
        engine = engine_of(pipeline)
        assert engine is not None
        outcomes.append(Outcome(latents, engine.statistics, engine.buffer_bytes))
    return outcomes
