"""In gangs each family draws what one device draws, also if they change, are cancelled or break."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    ErnieImagePipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    HunyuanImagePipeline,
    ModularPipeline,
    QwenImage21Pipeline,
)
from PIL import Image

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.denoise import Denoiser, DenoiseState
from distriray.errors import GangBroken, GenerationCancelled
from distriray.parallel import engine_of
from distriray.parallel.schedules import Schedules, Turn
from tests.likeness import LIKENESS, apart, differs
from tests.models import tiny_flux, tiny_sd3
from tests.unit.flow_matching.families import BRANCHES_APART, MODELS, SMALL, begin, skip_unless_taken
from tests.unit.flow_matching.gangs import SYNC, TALL, Gangs
from tests.unit.flow_matching.ordinary import named, on_pictures, plain
from tests.unit.test_denoise import MASK, PICTURE, SIZE, finish


@pytest.fixture(scope="module")
def in_sync(model: str) -> Gangs:
    return Gangs(MODELS[model], **SYNC)


@pytest.mark.parametrize("task", ["text-to-image", "image-to-image", "inpainting"])
def test_a_gang_in_sync_draws_what_the_pipeline_draws(
    pipeline: Any, denoiser: Denoiser, in_sync: Gangs, task: str
) -> None:
    call = {**TALL, "num_inference_steps": 4, "guidance_scale": denoiser.terms.guidance_scale}
    own = pipeline
    if task != "text-to-image":
        own = on_pictures(pipeline, task)
        size = call["width"], call["height"]
        # Z-Image's pipeline does not scale pictures.
        call |= {"image": PICTURE.resize(size), "strength": 0.8}
        if task == "inpainting":
            call["mask_image"] = MASK.resize(size)
    latents = plain(own, [1], **call)
    (picture,) = plain(own, [1], output_type="pil", **call)
    changing = [(2, 4, 1)] if task == "inpainting" else []  # what keeps the rest goes along
    for sizes in ((1,), (2,), (3,), *changing):
        for drawn in in_sync.draw(sizes, **call):
            assert differs(drawn.latents, latents) <= LIKENESS, sizes
            assert apart(drawn.picture, picture) <= 1, sizes


@pytest.mark.parametrize("scheduler", [None, "unipc"])
def test_gangs_that_change_in_the_middle_draw_what_the_pipeline_draws(
    pipeline: Any, in_sync: Gangs, scheduler: str | None
) -> None:
    skip_unless_taken(Denoiser(pipeline), scheduler)
    modular = isinstance(pipeline, ModularPipeline)
    (picture,) = plain(pipeline, [1], named(scheduler, pipeline), output_type="pil", **TALL)
    one, other = in_sync.draw((2, 4, 1, 2), **TALL, scheduler=scheduler)
    assert apart(one.picture, picture) <= 1 and apart(other.picture, picture) <= 1
    assert one.preview == other.preview
    kinds = (
        ErnieImagePipeline | Flux2Pipeline | Flux2KleinPipeline | HunyuanImagePipeline | QwenImage21Pipeline
    )
    of_sixteen = isinstance(pipeline, kinds) or modular
    assert one.preview.size == ((16, 32) if of_sixteen else (16, 40))


def test_changing_gangs_in_displaced_mode_start_with_one_fresh_step(model: str) -> None:
    gangs = Gangs(MODELS[model], exchange="displaced", warmup_steps=1, cfg_parallel=False)
    latents = gangs.draw((2, 4, 1, 2), **TALL)[0].latents
    assert gangs.synchronous == [True, False, True, False, True, True, True, False]
    assert latents.isfinite().all()


def test_a_step_that_is_cancelled_leaves_the_state_as_it_was(model: str) -> None:
    pipeline = parallelize(MODELS[model](), connect("local"))
    denoiser, engine = Denoiser(pipeline), engine_of(pipeline)
    assert engine is not None
    state = begin(denoiser, [1], **SMALL)
    expected = finish(denoiser, DenoiseState.from_bytes(state.to_bytes()))
    denoiser.step(state)
    engine.ask_cancel()
    with pytest.raises(GenerationCancelled):
        denoiser.step(state)
    assert state.step == 1 and torch.equal(finish(denoiser, state), expected)


def test_who_survives_a_gang_goes_on_with_the_step_that_it_holds(model: str, pipeline: Any) -> None:
    pipelines = [MODELS[model](), MODELS[model]()]

    def rank(communicator: Communicator) -> Image.Image | None:
        pipeline = parallelize(pipelines[communicator.rank], communicator, ParallelConfig(**SYNC))
        denoiser = Denoiser(pipeline)
        state = begin(denoiser, [1], prompt="a lake", **TALL)
        if communicator.rank == 1:
            for _ in range(4):
                denoiser.step(state)
            communicator.abort()
            return None
        with pytest.raises(GangBroken):
            finish(denoiser, state)
        assert state.step in (3, 4), "the fourth, unless a message of it was under way"
        parallelize(pipeline, connect("local"), ParallelConfig(**SYNC))
        finish(denoiser, state)
        return denoiser.decode(state)[0]

    drawn = run_in_lockstep(2, rank)[0]
    assert drawn is not None
    assert apart(drawn, plain(pipeline, [1], output_type="pil", **TALL)[0]) <= 1


@pytest.mark.parametrize("scheduler", [None, "unipc"])
def test_the_engine_knows_every_timestep_without_reading_the_latents_device(
    monkeypatch: pytest.MonkeyPatch, model: str, scheduler: str | None
) -> None:
    """By the scheduler of the state at hand, of whatever step it has come with."""
    seen: list[Any] = []
    read = Schedules.read

    def watch(self: Schedules, *call: Any) -> Any:
        seen.append(read(self, *call))
        return seen[-1]

    monkeypatch.setattr(Schedules, "read", watch)
    denoiser = Denoiser(parallelize(MODELS[model](), connect("local")))
    skip_unless_taken(denoiser, scheduler)
    guided = model in BRANCHES_APART and denoiser.terms.guidance_scale > denoiser.terms.unguided
    calls = 2 if guided else 1  # of the network, a step
    states = [begin(denoiser, [1], **SMALL, scheduler=scheduler) for _ in range(2)]
    denoiser.step(states[0])
    states[0] = DenoiseState.from_bytes(states[0].to_bytes())
    for state in states:
        finish(denoiser, state)
    timesteps = states[0].values["timesteps"].repeat_interleave(calls).tolist()
    assert [moment.timestep for moment in seen] == [*timesteps, *timesteps]
    assert all(isinstance(moment.element, Turn) for moment in seen)


@pytest.mark.parametrize("exchange", ["sync", "displaced", "displaced_attention"])
@pytest.mark.parametrize(
    ("make", "layers", "text", "branches"), [(tiny_flux, 4, 512, 1), (tiny_sd3, 3, 333, 2)]
)
def test_buffers_are_as_large_as_the_page_of_models_says(
    make: Callable[[], Any], layers: int, text: int, branches: int, exchange: Any
) -> None:
    """On every rank, whatever the gang's size: those of all tokens' keys and values."""

    def rank(communicator: Communicator) -> int:
        pipeline = parallelize(
            make(), communicator, ParallelConfig(exchange=exchange, warmup_steps=1, cfg_parallel=False)
        )
        denoiser, engine = Denoiser(pipeline), engine_of(pipeline)
        state = begin(denoiser, [1], **{**SMALL, "num_inference_steps": 4})
        for _ in range(3):
            denoiser.step(state)
        assert engine is not None
        return engine.buffer_bytes

    tokens, channels, number = SIZE["height"] * SIZE["width"] // 16**2, 32, 4
    layer = 2 * channels * number * branches
    joint, image = layer * (tokens + text), layer * tokens * (make is tiny_sd3)  # the first block's second
    held = {"sync": 0, "displaced": 1, "displaced_attention": 2}[exchange]
    most = held * (layers * joint + image) + joint + image
    for size in (2, 3):
        for buffers in run_in_lockstep(size, rank):
            assert most - (joint + image) * (held > 0) <= buffers <= most * 1.01
