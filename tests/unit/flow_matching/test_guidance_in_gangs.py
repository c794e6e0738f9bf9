"""Guidance in gangs: halves with a branch each, and old values of branches that have calls of their own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, run_in_lockstep
from distriray.denoise import Denoiser
from distriray.parallel import engine_of
from tests.likeness import LIKENESS, differs
from tests.models import (
    tiny_chroma,
    tiny_flux3,
    tiny_hunyuan_image,
    tiny_qwen_image,
    tiny_qwen_image21,
    tiny_sd3,
)
from tests.unit.flow_matching.families import BRANCHES_APART, MODELS, SMALL, begin
from tests.unit.flow_matching.gangs import TALL, Gangs
from tests.unit.flow_matching.ordinary import plain
from tests.unit.test_denoise import finish


def test_guidance_halves_of_a_gang_draw_what_the_pipeline_draws(sd3: Any) -> None:
    gangs = Gangs(tiny_sd3, exchange="sync", cfg_parallel=True)
    expected = plain(sd3, [1], **TALL)
    for drawn in gangs.draw((2, 4), **TALL):
        assert differs(drawn.latents, expected) <= LIKENESS


@pytest.mark.parametrize("model", BRANCHES_APART)
def test_a_gang_whose_halves_have_a_branch_each_draws_what_the_pipeline_draws(model: str) -> None:
    """A gang of two bit for bit; also one that changes in the middle, and where guidance ends."""
    pipeline, gangs = MODELS[model](), Gangs(MODELS[model], exchange="sync")
    call = {**TALL, "num_inference_steps": 4, "guidance_scale": 3.0}
    latents = plain(pipeline, [1], **call)
    for sizes in ((2,), (4,), (4, 2, 1, 2)):
        for drawn in gangs.draw(sizes, **call):
            assert differs(drawn.latents, latents) <= LIKENESS * (sizes != (2,)), sizes
    (one,), *others = (gangs.draw(sizes, **call, guidance_end=0.5) for sizes in ((1,), (2,), (4, 2)))
    for drawn in chain.from_iterable(others):
        assert differs(drawn.latents, one.latents) <= LIKENESS


@pytest.mark.parametrize("model", BRANCHES_APART)
def test_old_values_of_halves_with_a_branch_each_begin_with_one_fresh_step(model: str) -> None:
    gangs = Gangs(MODELS[model], exchange="displaced", warmup_steps=1)
    latents = gangs.draw((4, 2), **TALL, guidance_scale=3.0, guidance_end=0.75)[0].latents
    # Two ranks exchange nothing with guidance; without it they have the image's halves.
    assert gangs.synchronous == [True, False, False, False, True, True, True, False]
    assert latents.isfinite().all()


@pytest.mark.parametrize(
    "make", [tiny_chroma, tiny_qwen_image, tiny_qwen_image21, tiny_flux3, tiny_hunyuan_image]
)
def test_each_branch_that_has_calls_of_its_own_is_displaced_by_itself(make: Callable[[], Any]) -> None:
    def rank(communicator: Communicator) -> list[bool]:
        pipeline = parallelize(
            make(),
            communicator,
            ParallelConfig(exchange="displaced", warmup_steps=1, cfg_parallel=False),
        )
        denoiser, engine = Denoiser(pipeline), engine_of(pipeline)
        assert engine is not None
        synchronous, compute = [], engine.network.compute

        def noted(*args: Any) -> Any:
            step = engine.context.step
            assert step is not None
            synchronous.append(not step.displaced)
            return compute(*args)

        engine.network.compute = noted  # type: ignore[method-assign]
        finish(denoiser, begin(denoiser, [1], **SMALL, guidance_scale=3.0))
        finish(denoiser, begin(denoiser, [1], **SMALL, guidance_scale=3.0))
        return synchronous

    assert run_in_lockstep(2, rank) == [[True, True, False, False, False, False] * 2] * 2
