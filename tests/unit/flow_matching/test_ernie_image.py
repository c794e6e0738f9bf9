"""ERNIE-Image: what is its alone."""

from __future__ import annotations

import pytest
import torch

from distriray.denoise import Denoiser
from distriray.errors import UnsupportedModel
from tests.models import tiny_ernie_image, tiny_ernie_image_transformer
from tests.unit.flow_matching.families import begin
from tests.unit.flow_matching.ordinary import plain
from tests.unit.test_denoise import SIZE, finish


def test_what_writes_prompts_of_ernie_image_anew_is_not_asked() -> None:
    pipeline, call = tiny_ernie_image(), {"num_inference_steps": 2, **SIZE}
    expected = plain(pipeline, [1], **call)
    pipeline.pe, pipeline.pe_tokenizer = pipeline.text_encoder, pipeline.tokenizer
    with pytest.raises(ValueError, match="chat_template"):
        plain(pipeline, [1], **call)
    denoiser = Denoiser(pipeline)
    assert torch.equal(finish(denoiser, begin(denoiser, [1], prompt="a lake", **call)), expected)


def test_ernie_images_of_larger_patches_are_refused_by_name() -> None:
    pipeline = tiny_ernie_image()
    pipeline.transformer = tiny_ernie_image_transformer(patch_size=2)
    with pytest.raises(UnsupportedModel, match="ErnieImageTransformer2DModel with patch_size 2"):
        Denoiser(pipeline)
