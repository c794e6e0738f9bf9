"""Table of the pipeline families. A new one is a file of this folder and one line of `PIPELINES`.

Importing this loads neither torch nor diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from distriray.denoise.pipelines.sizes import Configs, Sizes, unet_sizes
from distriray.errors import UnsupportedModel

if TYPE_CHECKING:
    from distriray.denoise.pipelines.base import PipelineSteps


@dataclass(frozen=True)
class Family:
    """One family of diffusers pipelines.

    Attributes:
        home: module and name of its `PipelineSteps`, imported when there is such a pipeline; a leading dot is
            this folder.
        models: those that it stands for, in the words of the message that lists what there is.
        sizes: finds the sizes of its pictures in the configurations of a model's components.
    """

    home: str
    models: str
    sizes: Callable[[Configs], Sizes]

    @property
    def steps(self) -> type[PipelineSteps]:
        """Its subclass of `PipelineSteps`."""
        module, name = self.home.split(":")
        steps: type[PipelineSteps] = getattr(import_module(module, __package__), name)
        return steps


PIPELINES: dict[str, Family] = {
    "StableDiffusion": Family(".sd:StableDiffusion", "Stable Diffusion 1.x and 2.x", unet_sizes),
    "StableDiffusionXL": Family(".sdxl:StableDiffusionXL", "Stable Diffusion XL", unet_sizes),
}
"""Every family, by what diffusers' names of its pipelines begin with. A state keeps that name."""

TASKS = ("Pipeline", "Img2ImgPipeline", "InpaintPipeline")
"""What the names of a family's pipelines end with."""


def family_named(class_name: str) -> str | None:
    """The family in `PIPELINES` of the pipelines of a class; None where there is none."""
    return next((name for name in PIPELINES for task in TASKS if class_name == name + task), None)


def family_of(pipeline: Any) -> str:
    """The family in `PIPELINES` of a diffusers pipeline.

    Raises:
        UnsupportedModel: there is none; the message lists what there is.
    """
    for base in type(pipeline).__mro__:
        name = family_named(base.__name__)
        if name is not None and isinstance(pipeline, PIPELINES[name].steps.kinds):
            return name
    known = "; ".join(
        f"{family.models} ({', '.join(name + task for task in TASKS)})" for name, family in PIPELINES.items()
    )
    raise UnsupportedModel(
        f"{type(pipeline).__name__} cannot be denoised step by step; supported are {known}"
    )
