"""diffusers' pipelines around transformers, called plainly, in gangs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import (
    ChromaInpaintPipeline,
    FluxInpaintPipeline,
    QwenImageInpaintPipeline,
    StableDiffusion3InpaintPipeline,
    ZImageInpaintPipeline,
)
from PIL import Image

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, run_in_lockstep
from tests.edits import shrink, sized
from tests.models import (
    TEXT_WIDTH,
    tiny_chroma,
    tiny_ernie_image,
    tiny_flux,
    tiny_flux2,
    tiny_flux3,
    tiny_flux3_distilled,
    tiny_flux_fill,
    tiny_hunyuan_image,
    tiny_hunyuan_image_distilled,
    tiny_kontext,
    tiny_krea2,
    tiny_longcat_image,
    tiny_longcat_image_edit,
    tiny_ovis_image,
    tiny_pixart,
    tiny_qwen_image,
    tiny_qwen_image21,
    tiny_qwen_image_edit,
    tiny_qwen_image_edit_plus,
    tiny_sd3,
    tiny_z_image,
)
from tests.parameters import sweep
from tests.unit.parallel.transformers import error, noise, watched

PROMPT = {"prompt": "a lake at dusk", "max_sequence_length": 12, "output_type": "pt"}
EMBEDDED = {"prompt_embeds": noise(1, 1, 7, TEXT_WIDTH)}
NEGATIVE = {"negative_prompt_embeds": noise(2, 1, 7, TEXT_WIDTH)}
NO_RESIZING = {"max_area": 96 * 64, "_auto_resize": False}
EDITED = {"prompt": "a lake at dusk", "negative_prompt": "fog", "true_cfg_scale": 3.0, "output_type": "pt"}
BARE = {"negative_prompt": None, "guidance_scale": 3.0, "output_type": "pt"}
STACKED = {
    "prompt_embeds": noise(1, 1, 7, 3, TEXT_WIDTH),
    "prompt_embeds_mask": torch.tensor([[True] * 5 + [False] * 2]),
}
PADDED = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
MASKED = {"image": Image.linear_gradient("L").resize((64, 96)).convert("RGB"), "strength": 1.0}
MASKED["mask_image"] = Image.radial_gradient("L").resize((64, 96))


def filling(kind: Any, make: Callable[[], Any]) -> Callable[[], Any]:
    """diffusers' pipeline that fills in masks, around the models of the one that is made."""

    def filled() -> Any:
        pipeline = kind.from_pipe(make())
        if kind is ChromaInpaintPipeline:  # which asks for what no network of Chroma has
            pipeline.transformer.register_to_config(guidance_embeds=False)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    filled.__name__ = kind.__name__
    return filled


@dataclass(frozen=True)
class Case:
    """A pipeline and its call.

    Attributes:
        calls: of the network, a step.
    """

    make: Callable[[], Any]
    arguments: dict[str, Any] = field(hash=False)
    calls: int = 1

    def __str__(self) -> str:
        return self.make.__name__.removeprefix("tiny_")

    def draw(self, pipeline: Any) -> torch.Tensor:
        """Pixels or latents of one picture of 96x64."""
        call = {"height": 96, "width": 64, "num_inference_steps": 3, **self.arguments}
        with sized(pipeline, call) as given:
            images: torch.Tensor = pipeline(generator=torch.Generator().manual_seed(7), **given).images
        return images


CASES = [
    Case(tiny_sd3, PROMPT),
    Case(tiny_flux, PROMPT),
    Case(tiny_flux, {**PROMPT, "negative_prompt": "fog", "true_cfg_scale": 3.0}, calls=2),
    Case(tiny_kontext, {**PROMPT, "image": Image.new("RGB", (64, 96), "red"), **NO_RESIZING}),
    Case(tiny_flux2, PROMPT),
    Case(tiny_flux3, {"prompt": "a lake at dusk", "negative_prompt": "fog", "output_type": "pt"}, calls=2),
    Case(tiny_flux3_distilled, {"prompt": "a lake at dusk", "output_type": "pt"}),
    Case(
        tiny_flux3_distilled,
        {"prompt": "at night", "image": Image.new("RGB", (96, 64), "red"), "output_type": "pt"},
    ),
    Case(tiny_chroma, {**PROMPT, "guidance_scale": 1.0}),
    Case(
        tiny_longcat_image,
        {"prompt": "a lake", "guidance_scale": 3.0, "enable_prompt_rewrite": False, "output_type": "pt"},
        calls=2,
    ),
    Case(
        tiny_longcat_image_edit,
        {"prompt": "at night", "image": Image.new("RGB", (96, 64), "red"), "output_type": "pt"},
        calls=2,
    ),
    Case(
        tiny_hunyuan_image,
        {"prompt": "a sign that says 'lake'", "negative_prompt": "fog", "output_type": "pt"},
        calls=2,
    ),
    Case(tiny_hunyuan_image_distilled, {"prompt": "a lake at dusk", "output_type": "pt"}),
    Case(tiny_ovis_image, {**EMBEDDED, **NEGATIVE, **BARE}, calls=2),
    Case(tiny_krea2, {**STACKED, "guidance_scale": 0.0, "output_type": "latent"}),
    Case(
        tiny_ernie_image,
        {"prompt": "a lake at dusk", "negative_prompt": "fog", "guidance_scale": 3.0, "output_type": "pt"},
    ),
    Case(
        tiny_qwen_image,
        {
            **EMBEDDED,
            "prompt_embeds_mask": PADDED,
            "negative_prompt_embeds": noise(2, 1, 5, TEXT_WIDTH),
            "negative_prompt_embeds_mask": torch.ones((1, 5)),
            "true_cfg_scale": 3.0,
            "output_type": "latent",
        },
        calls=2,
    ),
    Case(tiny_qwen_image_edit, {**EDITED, "image": Image.new("RGB", (96, 64), "red")}, calls=2),
    Case(
        tiny_qwen_image_edit_plus,
        {**EDITED, "image": [Image.new("RGB", (96, 64), "red"), Image.new("RGB", (64, 96), "blue")]},
        calls=2,
    ),
    Case(tiny_qwen_image21, {"prompt": "a lake at dusk", "output_type": "pt"}),
    Case(
        tiny_qwen_image21,
        {
            "prompt_embeds": noise(1, 2, 7, TEXT_WIDTH),
            "prompt_embeds_mask": torch.tensor([[True] * 7, [True] * 5 + [False] * 2]),
            "negative_prompt_embeds": noise(2, 2, 5, TEXT_WIDTH),
            "true_cfg_scale": 3.0,
            "use_kv_cache": False,
            "output_type": "latent",
        },
        calls=2,
    ),
    Case(
        tiny_z_image,
        {
            "prompt_embeds": [noise(1, 7, TEXT_WIDTH)],
            "negative_prompt_embeds": [noise(2, 40, TEXT_WIDTH)],
            "guidance_scale": 3.0,
            "output_type": "pt",
        },
    ),
    Case(
        tiny_pixart,
        {
            **EMBEDDED,
            **NEGATIVE,
            "prompt_attention_mask": PADDED,
            "negative_prompt_attention_mask": torch.ones_like(PADDED),
            "negative_prompt": None,
            "use_resolution_binning": False,
            "output_type": "pt",
        },
    ),
    Case(filling(StableDiffusion3InpaintPipeline, tiny_sd3), {**PROMPT, **MASKED}),
    Case(filling(FluxInpaintPipeline, tiny_flux), {**PROMPT, **MASKED}),
    Case(filling(ChromaInpaintPipeline, tiny_chroma), {**PROMPT, **MASKED, "guidance_scale": 1.0}),
    Case(
        filling(QwenImageInpaintPipeline, tiny_qwen_image),
        {**PROMPT, **MASKED, "negative_prompt": "fog", "true_cfg_scale": 3.0},
        calls=2,
    ),
    Case(filling(ZImageInpaintPipeline, tiny_z_image), {**PROMPT, **MASKED, "guidance_scale": 3.0}),
    Case(tiny_flux_fill, {**PROMPT, **MASKED}),
]


UNNAMED = [
    Case(tiny_chroma, {**PROMPT, "negative_prompt": "fog", "guidance_scale": 3.0}, calls=2),
    Case(
        tiny_krea2,
        {
            **STACKED,
            "negative_prompt_embeds": noise(2, 1, 7, 3, TEXT_WIDTH),
            "negative_prompt_embeds_mask": torch.ones((1, 7), dtype=torch.bool),
            "guidance_scale": 1.0,
            "output_type": "latent",
        },
        calls=2,
    ),
]
"""Guided by a call for each branch, which the pipelines do not name."""


@pytest.fixture(autouse=True)
def small_megapixels(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.mark.parametrize("case", [*CASES, *UNNAMED], ids=str)
@pytest.mark.parametrize("ranks", sweep([2, 3]))
def test_a_whole_pipeline_equals_itself_alone(case: Case, ranks: int) -> None:
    expected = case.draw(case.make())

    def rank(communicator: Communicator) -> torch.Tensor:
        return case.draw(parallelize(case.make(), communicator, ParallelConfig(exchange="sync")))

    for image in run_in_lockstep(ranks, rank):
        assert error(image, expected) < 1e-5


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_whole_pipeline_displaces_all_steps_but_the_first_of_each_image(case: Case) -> None:
    def rank(communicator: Communicator) -> list[bool]:
        pipeline = parallelize(
            case.make(),
            communicator,
            ParallelConfig(exchange="displaced", warmup_steps=1, cfg_parallel=False),
        )
        synchronous = watched(pipeline.transformer)
        case.draw(pipeline)
        case.draw(pipeline)
        return synchronous

    image = [True] * case.calls + [False] * 2 * case.calls
    assert run_in_lockstep(2, rank) == [image * 2] * 2


@pytest.mark.parametrize("case", UNNAMED, ids=str)
def test_branches_that_a_pipeline_does_not_name_are_never_displaced(case: Case) -> None:
    def rank(communicator: Communicator) -> list[bool]:
        config = ParallelConfig(exchange="displaced", warmup_steps=1, cfg_parallel=False)
        pipeline = parallelize(case.make(), communicator, config)
        synchronous = watched(pipeline.transformer)
        case.draw(pipeline)
        return synchronous

    assert run_in_lockstep(2, rank) == [[True] * 3 * case.calls] * 2
