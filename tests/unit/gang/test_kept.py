"""What a worker keeps from step to step: nothing of it stays where a segment ends before its image does."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

from distriray.denoise.pipelines.families import qwen_image21
from distriray.gang.messages import SegmentEnd
from tests.models import save, tiny_qwen_image21

from .runners import Gang, endings


@pytest.fixture(scope="module")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Gang:
    folder = tmp_path_factory.mktemp("qwen-image-2.1")
    save(tiny_qwen_image21(), folder)
    return Gang(folder, 1)


@pytest.mark.parametrize(
    ("asked", "ending"),
    [
        ("ask_yield", SegmentEnd.YIELDED),
        ("ask_cancel", SegmentEnd.CANCELLED),
        (torch.OutOfMemoryError("CUDA out of memory"), SegmentEnd.REFUSED),
    ],
)
def test_keys_and_values_are_let_go_where_an_image_is_left(
    gang: Gang, monkeypatch: pytest.MonkeyPatch, asked: str | Exception, ending: SegmentEnd
) -> None:
    kept: WeakSet[QwenImage21KVCache] = WeakSet()
    counts = []

    def make(layers: int) -> QwenImage21KVCache:
        cache = QwenImage21KVCache(layers)
        kept.add(cache)
        return cache

    monkeypatch.setattr(qwen_image21, "QwenImage21KVCache", make)
    (runner,) = gang.runners
    step = runner._denoiser.step

    def one(state: Any) -> None:
        step(state)
        counts.append(len(kept))
        if isinstance(asked, Exception):
            raise asked
        getattr(runner._engine, asked)()

    monkeypatch.setattr(runner._denoiser, "step", one)
    assert endings(gang.run(link="alone", num_inference_steps=4, guidance_scale=3.0)) == [ending]
    assert counts[0] == 2 and not kept
