"""What tiny models that edit are shown, and megapixels of fewer pixels for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
from diffusers import LongCatImageEditPipeline
from diffusers.pipelines.flux import pipeline_flux_kontext, pipeline_flux_kontext_inpaint
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_inpaint,
    pipeline_qwenimage_edit_plus,
)
from diffusers.pipelines.qwenimage21 import pipeline_qwenimage21
from PIL import Image

from distriray.denoise import Denoiser
from distriray.denoise.pipelines import megapixels
from distriray.denoise.pipelines.families import flux
from distriray.picture import Picture
from distriray.references import Editing, Reference

SHOWN = Image.radial_gradient("L").resize((120, 88)).convert("RGB")
"""What models that draw nothing from text alone are shown where a test says nothing."""
TO_FILL, FILLED = SHOWN.resize((96, 64)), Image.new("L", (96, 64))
"""What models that were made to fill in masks are given, and the mask."""
FILLED.paste(255, (32, 16, 80, 64))


def shown(denoiser: Denoiser, **fields: Any) -> dict[str, Any]:
    """Those fields, and a picture if the model needs one and they have none, and a mask likewise."""
    terms = denoiser.terms
    if terms.needs_mask:
        return {"image": TO_FILL, "mask_image": FILLED, **fields}
    needed = terms.editing is not None and terms.editing.needs_references and "references" not in fields
    return {**({"image": SHOWN} if needed else {}), **fields}


@contextmanager
def sized(pipeline: Any, call: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A call of diffusers' pipeline as it takes it: LongCat-Image-Edit's draws its size, and takes none."""
    if not isinstance(pipeline, LongCatImageEditPipeline):
        yield call
        return
    drawn = call["width"], call["height"]
    with mock.patch.object(pipeline_longcat_image_edit, "calculate_dimensions", lambda *_: drawn):
        yield {name: value for name, value in call.items() if name not in ("height", "width")}


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let models that see a megapixel of whatever they edit see a 64th of it, or less."""
    for module in (flux, pipeline_flux_kontext, pipeline_flux_kontext_inpaint):
        monkeypatch.setattr(module, "PREFERRED_KONTEXT_RESOLUTIONS", [(144, 96), (112, 112), (96, 144)])
    for module in (
        megapixels,
        pipeline_longcat_image_edit,
        pipeline_qwenimage_edit,
        pipeline_qwenimage_edit_inpaint,
        pipeline_qwenimage_edit_plus,
        pipeline_qwenimage21,
    ):
        whole = module.calculate_dimensions
        monkeypatch.setattr(
            module, "calculate_dimensions", lambda pixels, ratio, whole=whole: whole(pixels // 64, ratio)
        )


def editing_of(denoiser: Denoiser) -> Editing:
    assert denoiser.terms.editing is not None
    return denoiser.terms.editing


def as_taken(denoiser: Denoiser, pictures: list[Image.Image]) -> Any:
    """Pictures to edit as the ordinary pipeline takes them."""
    return pictures if editing_of(denoiser).max_references > 1 else pictures[0]


def references(pictures: list[Image.Image]) -> tuple[Reference, ...]:
    return tuple(Reference(image=Picture.of(picture)) for picture in pictures)
