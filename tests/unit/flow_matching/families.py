"""Tiny models of every family that denoises by flow matching, and requests for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from distriray.denoise import Denoiser, DenoiseState
from distriray.denoise.pipelines.registry import PIPELINES, family_of
from tests.edits import shown
from tests.models import (
    tiny_chroma,
    tiny_ernie_image,
    tiny_flux,
    tiny_flux2,
    tiny_flux2_klein,
    tiny_flux2_klein_distilled,
    tiny_flux3,
    tiny_flux3_distilled,
    tiny_flux_fill,
    tiny_flux_schnell,
    tiny_hunyuan_image,
    tiny_hunyuan_image_distilled,
    tiny_kontext,
    tiny_krea2,
    tiny_krea2_distilled,
    tiny_longcat_image,
    tiny_longcat_image_edit,
    tiny_ovis_image,
    tiny_qwen_image,
    tiny_qwen_image21,
    tiny_qwen_image_edit,
    tiny_qwen_image_edit_plus,
    tiny_sd3,
    tiny_z_image,
)
from tests.unit.test_denoise import SIZE
from tests.unit.test_denoise import begin as begin_as_asked

MODELS: dict[str, Callable[[], Any]] = {
    "sd3": tiny_sd3,
    "flux-dev": tiny_flux,
    "flux-schnell": tiny_flux_schnell,
    "flux-fill": tiny_flux_fill,
    "flux-kontext": tiny_kontext,
    "chroma": tiny_chroma,
    "ernie-image": tiny_ernie_image,
    "flux2-dev": tiny_flux2,
    "flux2-klein": tiny_flux2_klein,
    "flux2-klein-distilled": tiny_flux2_klein_distilled,
    "flux3": tiny_flux3,
    "flux3-distilled": tiny_flux3_distilled,
    "hunyuan-image": tiny_hunyuan_image,
    "hunyuan-image-distilled": tiny_hunyuan_image_distilled,
    "krea2": tiny_krea2,
    "krea2-distilled": tiny_krea2_distilled,
    "longcat-image": tiny_longcat_image,
    "longcat-image-edit": tiny_longcat_image_edit,
    "ovis-image": tiny_ovis_image,
    "qwen-image": tiny_qwen_image,
    "qwen-image-2.1": tiny_qwen_image21,
    "qwen-image-edit": tiny_qwen_image_edit,
    "qwen-image-edit-plus": tiny_qwen_image_edit_plus,
    "z-image": tiny_z_image,
}
BRANCHES_APART = [
    "chroma",
    "flux2-klein",
    "flux3",
    "hunyuan-image",
    "krea2",
    "longcat-image",
    "longcat-image-edit",
    "ovis-image",
    "qwen-image",
    "qwen-image-2.1",
    "qwen-image-edit",
    "qwen-image-edit-plus",
]
"""Those whose guidance branches have a call each."""
SMALL: dict[str, Any] = {"prompt": "a lake", "num_inference_steps": 3, **SIZE}


def begin(denoiser: Denoiser, seeds: list[int], **fields: Any) -> DenoiseState:
    """Those fields prepared, with consecutive seeds, and with the pictures that the model needs."""
    return begin_as_asked(denoiser, seeds, **shown(denoiser, **fields))


def skip_unless_taken(denoiser: Denoiser, scheduler: str | None) -> None:
    if scheduler is not None and scheduler not in denoiser.terms.schedulers:
        pytest.skip("not one of the family's")


def skip_unless_it_begins_from_pictures(pipeline: Any) -> None:
    if "image-to-image" not in PIPELINES[family_of(pipeline)].tasks:
        pytest.skip("the family has one pipeline, for other tasks")
