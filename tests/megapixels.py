"""Megapixels of fewer pixels, so that what a tiny model edits is as tiny."""

from __future__ import annotations

import pytest
from diffusers.pipelines.flux import pipeline_flux_kontext
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from diffusers.pipelines.qwenimage21 import pipeline_qwenimage21

from distriray.denoise.pipelines import flux, qwen_image, qwen_image21


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let models that see a megapixel of whatever they edit see a 64th of it, or less."""
    for module in (flux, pipeline_flux_kontext):
        monkeypatch.setattr(module, "PREFERRED_KONTEXT_RESOLUTIONS", [(144, 96), (112, 112), (96, 144)])
    for module in (
        qwen_image,
        qwen_image21,
        pipeline_qwenimage_edit,
        pipeline_qwenimage_edit_plus,
        pipeline_qwenimage21,
    ):
        whole = module.calculate_dimensions
        monkeypatch.setattr(
            module, "calculate_dimensions", lambda pixels, ratio, whole=whole: whole(pixels // 64, ratio)
        )
