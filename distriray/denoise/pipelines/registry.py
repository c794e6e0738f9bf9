"""Table of the pipeline families. A new one is a file of `families` and one line of `PIPELINES`.

Importing this loads neither torch nor diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from distriray.denoise.pipelines.family_terms import (
    chroma_terms,
    ernie_image_terms,
    flux2_klein_terms,
    flux2_terms,
    flux3_terms,
    flux_fill_terms,
    flux_kontext_terms,
    flux_terms,
    hunyuan_image_terms,
    krea2_terms,
    longcat_image_edit_terms,
    longcat_image_terms,
    ovis_image_terms,
    qwen_image21_terms,
    qwen_image_edit_plus_terms,
    qwen_image_edit_terms,
    qwen_image_terms,
    sd3_terms,
    unet_terms,
    z_image_terms,
)
from distriray.denoise.pipelines.sizes import (
    Configs,
    Sizes,
    flux2_sizes,
    flux_sizes,
    hunyuan_image_sizes,
    qwen_image21_sizes,
    qwen_image_sizes,
    sd3_sizes,
    unet_sizes,
)
from distriray.denoise.pipelines.terms import Terms
from distriray.errors import UnsupportedModel

if TYPE_CHECKING:
    from distriray.denoise.pipelines.base import PipelineSteps


TASKS = {"text-to-image": "Pipeline", "image-to-image": "Img2ImgPipeline", "inpainting": "InpaintPipeline"}
"""What the names of a family's pipelines end with, by task."""


@dataclass(frozen=True)
class PipelineFamily:
    """One family of diffusers pipelines.

    Attributes:
        home: module and name of its `PipelineSteps`, imported when there is such a pipeline; a leading dot is
            the folder `families`.
        models: those that it stands for, in the words of the message that lists what there is.
        sizes: finds the sizes of its pictures in the configurations of a model's components.
        terms: finds there what it says of a request's other fields.
        tasks: those that it has a pipeline each for; one that does all is text-to-image's by its name.
    """

    home: str
    models: str
    sizes: Callable[[Configs], Sizes]
    terms: Callable[[Configs], Terms] = unet_terms
    tasks: tuple[str, ...] = tuple(TASKS)

    @property
    def steps(self) -> type[PipelineSteps]:
        """Its subclass of `PipelineSteps`."""
        module, name = self.home.split(":")
        steps: type[PipelineSteps] = getattr(import_module(module, f"{__package__}.families"), name)
        return steps


_BY_ONE = ("text-to-image",)
"""Of families whose one pipeline does all that their models can."""
_BY_TWO = ("text-to-image", "inpainting")
"""Of those whose one pipeline edits pictures too, and another fills in masks of them."""

PIPELINES: dict[str, PipelineFamily] = {
    "StableDiffusion": PipelineFamily(".sd:StableDiffusion", "Stable Diffusion 1.x and 2.x", unet_sizes),
    "StableDiffusionXL": PipelineFamily(".sdxl:StableDiffusionXL", "Stable Diffusion XL", unet_sizes),
    "StableDiffusion3": PipelineFamily(
        ".sd3:StableDiffusion3", "Stable Diffusion 3 and 3.5", sd3_sizes, sd3_terms
    ),
    "Flux": PipelineFamily(".flux:Flux", "FLUX.1", flux_sizes, flux_terms),
    "FluxFill": PipelineFamily(".flux:FluxFill", "FLUX.1 Fill", flux_sizes, flux_fill_terms, _BY_ONE),
    "FluxKontext": PipelineFamily(
        ".flux:FluxKontext", "FLUX.1 Kontext", flux_sizes, flux_kontext_terms, _BY_TWO
    ),
    "Chroma": PipelineFamily(".chroma:Chroma", "Chroma", flux_sizes, chroma_terms),
    "Flux2": PipelineFamily(".flux2:Flux2", "FLUX.2 dev", flux2_sizes, flux2_terms, _BY_ONE),
    "Flux2Klein": PipelineFamily(
        ".flux2:Flux2Klein", "FLUX.2 klein", flux2_sizes, flux2_klein_terms, _BY_TWO
    ),
    "Flux3Modular": PipelineFamily(".flux3:Flux3", "FLUX.3", flux2_sizes, flux3_terms, _BY_ONE),
    "Flux3DistilledModular": PipelineFamily(
        ".flux3:Flux3Distilled", "FLUX.3 distilled", flux2_sizes, flux3_terms, _BY_ONE
    ),
    "QwenImage": PipelineFamily(".qwen_image:QwenImage", "Qwen-Image", qwen_image_sizes, qwen_image_terms),
    "QwenImageEdit": PipelineFamily(
        ".qwen_image:QwenImageEdit", "Qwen-Image-Edit", qwen_image_sizes, qwen_image_edit_terms, _BY_TWO
    ),
    "QwenImageEditPlus": PipelineFamily(
        ".qwen_image:QwenImageEditPlus",
        "Qwen-Image-Edit 2509 and 2511",
        qwen_image_sizes,
        qwen_image_edit_plus_terms,
        _BY_ONE,
    ),
    "QwenImage21": PipelineFamily(
        ".qwen_image21:QwenImage21", "Qwen-Image 2.1", qwen_image21_sizes, qwen_image21_terms, _BY_ONE
    ),
    "HunyuanImage": PipelineFamily(
        ".hunyuan_image:HunyuanImage",
        "HunyuanImage 2.1",
        hunyuan_image_sizes,
        hunyuan_image_terms,
        _BY_ONE,
    ),
    "ErnieImage": PipelineFamily(
        ".ernie_image:ErnieImage", "ERNIE-Image", flux2_sizes, ernie_image_terms, _BY_ONE
    ),
    "OvisImage": PipelineFamily(".ovis_image:OvisImage", "Ovis-Image", flux_sizes, ovis_image_terms, _BY_ONE),
    "LongCatImage": PipelineFamily(
        ".longcat_image:LongCatImage", "LongCat-Image", flux_sizes, longcat_image_terms, _BY_ONE
    ),
    "LongCatImageEdit": PipelineFamily(
        ".longcat_image:LongCatImageEdit",
        "LongCat-Image-Edit",
        flux_sizes,
        longcat_image_edit_terms,
        _BY_ONE,
    ),
    "Krea2": PipelineFamily(".krea2:Krea2", "Krea 2", qwen_image_sizes, krea2_terms, _BY_ONE),
    "ZImage": PipelineFamily(".z_image:ZImage", "Z-Image", flux_sizes, z_image_terms),
}
"""Every family, by what diffusers' names of its pipelines begin with. A state keeps that name."""


def family_named(class_name: str) -> str | None:
    """The family in `PIPELINES` of the pipelines of a class; None where there is none."""
    return next((name for name in PIPELINES if class_name in _classes(name)), None)


def family_of(pipeline: Any) -> str:
    """The family in `PIPELINES` of a diffusers pipeline.

    Raises:
        UnsupportedModel: there is none; the message lists what there is.
    """
    for base in type(pipeline).__mro__:
        name = family_named(base.__name__)
        if name is not None and isinstance(pipeline, PIPELINES[name].steps.kinds):
            return name
    known = "; ".join(f"{family.models} ({', '.join(_classes(name))})" for name, family in PIPELINES.items())
    raise UnsupportedModel(
        f"{type(pipeline).__name__} cannot be denoised step by step; supported are {known}"
    )


def _classes(name: str) -> list[str]:
    """The names of the classes of a family's pipelines."""
    return [name + TASKS[task] for task in PIPELINES[name].tasks]
