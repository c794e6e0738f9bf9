"""Text keys and values that cross-attention has cached are those of the text, and need little memory."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from distriray import ParallelConfig, parallelize
from distriray.collective import LockstepCommunicator, connect, run_in_lockstep
from distriray.parallel import engine_of
from distriray.parallel.layers.attention import CachedCrossAttention
from tests.models import tiny_sdxl_unet
from tests.unit.parallel.recorded import RecordedGraphs
from tests.unit.parallel.test_baked import noise


def test_cached_texts_of_all_shapes_share_memory_and_are_never_stale() -> None:
    unet = parallelize(tiny_sdxl_unet(), connect("local"), ParallelConfig())
    wanted = [noise(tiny_sdxl_unet(), 0, images=images, seed=images) for images in (4, 1, 2, 3, 4, 1)]
    found = [noise(unet, 0, images=images, seed=images) for images in (4, 1, 2, 3, 4, 1)]
    for here, there in zip(found, wanted, strict=True):
        assert torch.allclose(here, there, atol=1e-5)
    caches = [p for p in unet.attn_processors.values() if isinstance(p, CachedCrossAttention)]
    for cache in caches:
        assert len(cache._memory) == 1
    assert caches


def test_texts_that_graphs_have_cached_are_read_in_their_own_shape() -> None:
    """A step that measures drift is launched between captured ones."""

    def rank(communicator: LockstepCommunicator) -> list[bool]:
        config = ParallelConfig(exchange="displaced", warmup_steps="auto", cfg_parallel=False)
        unet = parallelize(tiny_sdxl_unet(), communicator, config)
        engine, drawn = engine_of(unet), []
        assert engine is not None
        for maker in (None, RecordedGraphs()):
            engine.capture_with(maker)
            for seed, tokens in enumerate((14, 7, 7, 14, 7)):
                with engine.image():
                    drawn += [noise(unet, step, seed=seed, tokens=tokens) for step in range(4)]
            assert maker is None or maker.made
        return [torch.equal(*pair) for pair in zip(drawn[:20], drawn[20:], strict=True)]

    assert all(map(all, run_in_lockstep(2, rank)))


def test_a_text_cached_in_the_other_mode_is_of_another_image() -> None:
    unet = parallelize(tiny_sdxl_unet(), connect("local"), ParallelConfig())
    wanted = parallelize(tiny_sdxl_unet(), connect("local"), ParallelConfig())
    with torch.inference_mode():
        noise(unet, 0, seed=1)
    noise(unet, 0, seed=2)
    with torch.inference_mode():
        found = noise(unet, 1, seed=2)
        assert torch.equal(found, noise(wanted, 1, seed=2))


@pytest.mark.parametrize("inference", [False, True])
def test_a_text_that_is_edited_in_place_counts_from_the_next_step(inference: bool) -> None:
    """torch counts what is written into tensors, but for those that were made in inference mode."""

    def steps(unet: UNet2DConditionModel) -> list[torch.Tensor]:
        with torch.inference_mode(inference):
            text = torch.ones((1, 9, 32))
            first = noise(unet, 0, text=text)
            return [first, noise(unet, 1, text=text.mul_(0.5))]

    unet = parallelize(tiny_sdxl_unet(), connect("local"), ParallelConfig())
    engine = engine_of(unet)
    assert engine is not None
    with engine.image():
        found = steps(unet)
    for here, there in zip(found, steps(tiny_sdxl_unet()), strict=True):
        assert torch.allclose(here, there, atol=1e-5)
