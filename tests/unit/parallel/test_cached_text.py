"""Text keys and values that cross-attention has cached are those of the text, and need little memory."""

from __future__ import annotations

import torch

from distriray import ParallelConfig, parallelize
from distriray.collective import connect
from distriray.parallel.layers.attention import CachedCrossAttention
from tests.models import tiny_sdxl_unet
from tests.unit.parallel.test_baked import noise


def test_cached_texts_of_all_shapes_share_memory_and_are_never_stale() -> None:
    unet = parallelize(tiny_sdxl_unet(), connect("local"), ParallelConfig())
    wanted = [noise(tiny_sdxl_unet(), 0, images=images, seed=images) for images in (4, 1, 2, 3, 4, 1)]
    found = [noise(unet, 0, images=images, seed=images) for images in (4, 1, 2, 3, 4, 1)]
    for here, there in zip(found, wanted, strict=True):
        assert torch.allclose(here, there, atol=1e-5)
    caches = [p for p in unet.attn_processors.values() if isinstance(p, CachedCrossAttention)]
    for cache in caches:
        assert len(cache._memory) == len(cache._text) == 1
    assert caches


def test_a_text_cached_in_the_other_mode_is_of_another_image() -> None:
    unet = parallelize(tiny_sdxl_unet(), connect("local"), ParallelConfig())
    wanted = parallelize(tiny_sdxl_unet(), connect("local"), ParallelConfig())
    with torch.inference_mode():
        noise(unet, 0, seed=1)
    noise(unet, 0, seed=2)
    with torch.inference_mode():
        found = noise(unet, 1, seed=2)
        assert torch.equal(found, noise(wanted, 1, seed=2))
