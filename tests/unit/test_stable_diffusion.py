"""Stable Diffusion 1.x and 2.x step by step: the ordinary pipelines' numbers, in gangs and in a host too."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
)
from PIL import Image

from deployments.models import sizes_of, terms_of
from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, all_gather, connect, run_in_lockstep
from distriray.denoise import SCHEDULERS, Denoiser, DenoiseState
from distriray.denoise.pipelines.sizes import Sizes
from distriray.errors import GangBroken, InvalidRequest, UnsupportedModel
from distriray.models import ModelSpec
from distriray.parallel import engine_of
from distriray.requests import SamplingParams
from tests.models import SHALLOW_SD, tiny_safety_checker, tiny_sd15, tiny_sd21, tiny_sdxl
from tests.parameters import sweep
from tests.unit.gang.runners import Gang
from tests.unit.test_denoise import (
    MASK,
    OF_AN_IMAGE,
    OF_THE_NETWORK,
    ON_PICTURE,
    OTHERS,
    PICTURE,
    SIZE,
    begin,
    failing_at_the_end,
    finish,
    finish_through_bytes,
    generators,
    ordinary,
    refuses,
)

MODELS = {"1.5": tiny_sd15, "2.1": tiny_sd21}
SMALL: dict[str, Any] = {"prompt": "a lake", "num_inference_steps": 3, **SIZE}


@pytest.fixture(scope="module", params=MODELS)
def pipeline(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param](**SHALLOW_SD)


@pytest.fixture(scope="module")
def denoiser(pipeline: Any) -> Denoiser:
    return Denoiser(pipeline)


@pytest.mark.parametrize("scheduler", sweep([None, *SCHEDULERS], first=2))
def test_steps_by_hand_are_the_ordinary_pipelines_bit_for_bit_also_through_bytes(
    pipeline: Any, denoiser: Denoiser, scheduler: str | None
) -> None:
    call = {"num_inference_steps": 5, "guidance_scale": 5.0}
    expected = ordinary(pipeline, scheduler, [1, 2], **call)
    state = begin(denoiser, [1, 2], prompt="a lake", scheduler=scheduler, **SIZE, **call)
    carried = finish_through_bytes(denoiser, state)
    assert torch.equal(finish(denoiser, state), expected)
    assert torch.equal(carried, expected)


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0, "negative_prompt": "fog"},
        {"guidance_scale": 4.0, "guidance_rescale": 0.7},
        {"guidance_scale": 4.0, "negative_prompt": "fog"},
    ],
)
def test_guidance_is_the_pipelines(pipeline: Any, denoiser: Denoiser, call: dict[str, Any]) -> None:
    latents = finish(denoiser, begin(denoiser, [3], **SMALL, **call))
    assert torch.equal(latents, ordinary(pipeline, None, [3], num_inference_steps=3, **call))


def test_both_branches_are_one_call_of_the_network(pipeline: Any, denoiser: Denoiser) -> None:
    batches: list[int] = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    try:
        finish(denoiser, begin(denoiser, [1, 2], **SMALL))
        finish(denoiser, begin(denoiser, [1, 2], **SMALL, guidance_scale=1.0))
    finally:
        hook.remove()
    assert batches == [4] * 3 + [2] * 3


def test_a_network_that_takes_the_guidance_scale_as_input_has_one_branch() -> None:
    """As those that are distilled for LCM."""
    pipeline = tiny_sd15(time_cond_proj_dim=16)
    call = {"num_inference_steps": 3, "guidance_scale": 8.0}
    expected = ordinary(pipeline, "lcm", [1, 2], **call)
    assert not torch.equal(ordinary(pipeline, "lcm", [1, 2], **{**call, "guidance_scale": 2.0}), expected)
    denoiser = Denoiser(pipeline)
    state = begin(denoiser, [1, 2], prompt="a lake", scheduler="lcm", **SIZE, **call)
    assert torch.equal(finish(denoiser, state), expected)


@pytest.mark.parametrize("skip", [0, 1])
def test_clip_skip_is_the_ordinary_pipelines(skip: int) -> None:
    pipeline = tiny_sd21()
    denoiser = Denoiser(pipeline)
    call = {"num_inference_steps": 3, "negative_prompt": "fog", "clip_skip": skip}
    latents = finish(denoiser, begin(denoiser, [3], prompt="a lake", **SIZE, **call))
    own = finish(denoiser, begin(denoiser, [3], prompt="a lake", **SIZE, **{**call, "clip_skip": None}))
    assert torch.equal(latents, own) == (skip == 0)
    vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder  # diffusers looks for its norm there
    assert torch.equal(latents, ordinary(pipeline, None, [3], guidance_scale=5.0, **call))


@pytest.mark.parametrize("channels", [4, 8])
def test_image_to_image_is_the_ordinary_pipelines(monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    """To rounding, and bit for bit where that has its latents in the order of memory that bytes restore."""
    pipeline = tiny_sd15(in_channels=channels, out_channels=channels)
    denoiser, other = Denoiser(pipeline), AutoPipelineForImage2Image.from_pipe(pipeline)
    other.set_progress_bar_config(disable=True)
    state = begin(denoiser, [1, 2], prompt="x", **SIZE, **ON_PICTURE)
    latents, call = finish(denoiser, state), {**ON_PICTURE, "num_images_per_prompt": 2}
    expected = other("x", generator=generators([1, 2]), output_type="latent", **call).images
    assert (latents - expected).abs().max() <= 1e-5 * expected.abs().max()
    prepare = other.prepare_latents
    monkeypatch.setattr(other, "prepare_latents", lambda *args: prepare(*args).contiguous())
    assert torch.equal(latents, other("x", generator=generators([1, 2]), output_type="latent", **call).images)


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize(
    ("scheduler", "strength"),
    sweep([("pndm", 0.8), ("ddim", 1.0), ("dpmpp-2m", 0.8), ("euler-ancestral", 0.8), ("heun", 1.0)]),
)
def test_inpainting_is_the_ordinary_pipelines_bit_for_bit_also_through_bytes(
    channels: int, scheduler: str, strength: float
) -> None:
    pipeline = tiny_sd15(in_channels=channels)
    denoiser, other = Denoiser(pipeline), AutoPipelineForInpainting.from_pipe(pipeline)
    kind, options = SCHEDULERS[scheduler]
    other.scheduler = kind.from_config(pipeline.scheduler.config, **options)
    other.set_progress_bar_config(disable=True)
    call = {**ON_PICTURE, **SIZE, "mask_image": MASK, "strength": strength}
    expected = other("x", generator=generators([1]), output_type="latent", **call).images
    state = begin(denoiser, [1], prompt="x", scheduler=scheduler, **call)
    denoiser.step(state)
    carried = DenoiseState.from_bytes(state.to_bytes())
    assert torch.equal(finish(denoiser, state), expected)
    assert torch.equal(finish(denoiser, carried), expected)


def test_inpainting_keeps_the_rest_with_latents_of_any_width() -> None:
    denoiser = Denoiser(tiny_sd15(in_channels=8, out_channels=8))  # which the ordinary pipeline refuses
    state = begin(denoiser, [1], prompt="x", mask_image=MASK, **ON_PICTURE, **SIZE)
    latents, kept = finish(denoiser, state), state.values["image_latents"]
    assert torch.equal(latents[..., 6:], kept[..., 6:])
    assert not torch.allclose(latents[..., :6], kept[..., :6], atol=0.1)


@pytest.mark.parametrize("call", [{}, ON_PICTURE, {**ON_PICTURE, "mask_image": MASK}])
def test_an_image_does_not_depend_on_its_batch(denoiser: Denoiser, call: dict[str, Any]) -> None:
    call = {**SMALL, "scheduler": "euler-ancestral", **call}
    together, alone = begin(denoiser, [1, 2, 3], **call), begin(denoiser, [2], **call)
    torch.testing.assert_close(finish(denoiser, together)[1:2], finish(denoiser, alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("mask_image", [None, MASK])
def test_strength_that_leaves_no_step_is_refused(
    denoiser: Denoiser, images: int, mask_image: Image.Image | None
) -> None:
    with pytest.raises(InvalidRequest, match="leaves none to do") as error:
        begin(denoiser, [1, 2][:images], **SMALL, image=PICTURE, mask_image=mask_image, strength=0.1)
    assert error.value.param == "strength"


@pytest.mark.parametrize("part", ["unet", "scheduler"])
@pytest.mark.parametrize("scheduler", ["pndm", "dpmpp-2m", "euler-ancestral"])
def test_whatever_fails_the_state_stays(denoiser: Denoiser, scheduler: str, part: str) -> None:
    state = begin(denoiser, [1], **SMALL, scheduler=scheduler)
    while not state.done:
        owner, name = (denoiser._pipeline.unet, "forward") if part == "unet" else (state.scheduler, "step")
        before = state.to_bytes()
        with failing_at_the_end(owner, name), pytest.raises(GangBroken):
            denoiser.step(state)
        assert state.to_bytes() == before
        denoiser.step(state)


def test_runge_kutta_steps_of_a_models_own_scheduler_can_be_undone() -> None:
    pipeline = tiny_sd15()
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, skip_prk_steps=False)
    denoiser = Denoiser(pipeline)
    state = begin(denoiser, [1], **{**SMALL, "num_inference_steps": 8})
    for _ in range(4):  # of one order: all but the first add to a tensor in place
        before = state.to_bytes()
        with failing_at_the_end(state.scheduler, "step"), pytest.raises(GangBroken):
            denoiser.step(state)
        assert state.to_bytes() == before
        denoiser.step(state)


def test_the_users_pipeline_keeps_its_scheduler() -> None:
    pipeline = tiny_sd15()
    pipeline.scheduler = scheduler = PNDMScheduler.from_config(
        pipeline.scheduler.config, skip_prk_steps=False
    )
    before = dict(scheduler.config), dict(vars(scheduler))
    denoiser = Denoiser(pipeline)
    finish(denoiser, begin(denoiser, [1], **SMALL, scheduler="euler"))
    assert pipeline.scheduler is scheduler
    assert (dict(scheduler.config), dict(vars(scheduler))) == before


def test_what_the_pipeline_sets_of_a_scheduler_whose_file_does_not_say_it_counts() -> None:
    """It leaves samples unclipped and moves timesteps by one, whatever the scheduler has by default."""
    parts = {**tiny_sd15(**SHALLOW_SD).components, "scheduler": DDIMScheduler(beta_schedule="scaled_linear")}
    pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    denoiser = Denoiser(pipeline)
    latents = finish(denoiser, begin(denoiser, [1], **SMALL, guidance_scale=5.0))
    assert torch.equal(latents, ordinary(pipeline, None, [1], num_inference_steps=3, guidance_scale=5.0))


@pytest.mark.parametrize("field", OF_THE_NETWORK)
def test_every_field_decides_the_picture_or_is_refused_by_name(denoiser: Denoiser, field: str) -> None:
    plain = {**SMALL, "seed": 1, **OF_AN_IMAGE.get(field, {})}
    if field in denoiser.terms.lacks:
        refuses(denoiser, plain, field)
        return
    usual, other = (
        finish(denoiser, denoiser.prepare(SamplingParams(**fields)))
        for fields in (plain, {**plain, field: OTHERS[field]})
    )
    assert usual.shape != other.shape or not torch.allclose(usual, other, rtol=1e-3, atol=1e-3)


def test_pictures_and_previews(pipeline: Any, denoiser: Denoiser) -> None:
    state = begin(denoiser, [1, 2], **{**SMALL, "height": 192, "width": 256})
    denoiser.step(state)
    estimate = state.estimate
    assert estimate is not None and denoiser.preview(state).size == (64, 48)
    finish(denoiser, state)
    expected = ordinary(
        pipeline, None, [1, 2], height=192, width=256, num_inference_steps=3, guidance_scale=5.0,
        output_type="np",
    )  # fmt: skip
    for picture, values in zip(denoiser.decode(state), expected, strict=True):
        assert np.array_equal(np.array(picture), (values * 255).round().astype("uint8"))


def test_the_last_estimate_is_the_picture() -> None:
    """Of the velocity that 2.x predicts too: a wrong formula shows here and in previews alone."""
    for make in MODELS.values():
        denoiser = Denoiser(make())
        state = begin(denoiser, [1], **{**SMALL, "scheduler": "euler"})
        latents = finish(denoiser, state)
        assert state.estimate is not None
        torch.testing.assert_close(state.estimate, latents, rtol=1e-3, atol=1e-3)


def scores(pipeline: Any, pictures: list[Image.Image]) -> list[float]:
    """How near each picture is to the nearest concept of the pipeline's safety checker."""
    checker, inputs = pipeline.safety_checker, pipeline.feature_extractor(pictures, return_tensors="pt")
    embeds = checker.visual_projection(checker.vision_model(inputs.pixel_values)[1])
    return torch.nn.functional.cosine_similarity(embeds, checker.concept_embeds[:1]).tolist()


def test_what_a_safety_checker_finds_is_black_in_pictures_and_in_previews() -> None:
    pipeline = tiny_sd15()
    call = {**SMALL, "num_images": 2, "seed": 1}
    plain = Denoiser(pipeline)
    state = plain.prepare(SamplingParams(**call))
    finish(plain, state)
    unchecked = plain.decode(state)
    assert all(any(high for _, high in picture.getextrema()) for picture in unchecked)

    pipeline.register_modules(**tiny_safety_checker())
    first, second = scores(pipeline, unchecked)
    assert abs(first - second) > 4e-3  # it compares three decimals
    pipeline.safety_checker.concept_embeds_weights.data.fill_((first + second) / 2)
    checked = Denoiser(pipeline)
    pictures, black = checked.decode(state), Image.new("RGB", (SIZE["width"], SIZE["height"]))
    assert pictures == [black if score > min(first, second) else picture
                        for picture, score in zip(unchecked, (first, second), strict=True)]  # fmt: skip
    offered = pipeline(
        "a lake", num_images_per_prompt=2, generator=generators([1, 2]), num_inference_steps=3,
        guidance_scale=5.0, **SIZE,
    )  # fmt: skip
    assert pictures == offered.images and sorted(offered.nsfw_content_detected) == [False, True]

    pipeline.safety_checker.concept_embeds_weights.data.fill_(-2.0)  # everything offends
    assert not any(high for _, high in checked.preview(state).getextrema())
    assert any(high for _, high in plain.preview(state).getextrema())


def test_models_that_stable_diffusion_is_not_are_refused_by_name() -> None:
    parts = tiny_sd15().components
    with pytest.raises(
        UnsupportedModel, match=r"StableDiffusionPAGPipeline cannot .*2\.x \(StableDiffusionPip"
    ):
        Denoiser(StableDiffusionPAGPipeline(**parts, requires_safety_checker=False))
    upscaler = StableDiffusionUpscalePipeline(
        vae=parts["vae"], text_encoder=parts["text_encoder"], tokenizer=parts["tokenizer"],
        unet=tiny_sd15(in_channels=7, num_class_embeds=10).unet, low_res_scheduler=parts["scheduler"],
        scheduler=parts["scheduler"],
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match="StableDiffusionUpscalePipeline cannot be"):
        Denoiser(upscaler)
    with pytest.raises(UnsupportedModel, match="a U-Net of 5 channels"):
        Denoiser(tiny_sd15(in_channels=5))  # with depth
    with pytest.raises(UnsupportedModel, match="num_class_embeds 10"):
        Denoiser(tiny_sd15(num_class_embeds=10))
    textless = tiny_sd15()
    textless.register_modules(text_encoder=None)
    with pytest.raises(UnsupportedModel, match="without text_encoder"):
        Denoiser(textless)
    asymmetric = tiny_sd15()
    asymmetric.register_modules(vae=AsymmetricAutoencoderKL(norm_num_groups=8, latent_channels=4,
        down_block_out_channels=(8,), up_block_out_channels=(8,)))  # fmt: skip
    with pytest.raises(UnsupportedModel, match="AsymmetricAutoencoderKL"):
        Denoiser(asymmetric)


def test_default_sizes_need_not_be_square() -> None:
    denoiser = Denoiser(tiny_sd15(sample_size=(8, 12)))
    state = begin(denoiser, [1], prompt="x", image=PICTURE, mask_image=MASK)
    assert denoiser.sizes.default == (64, 96) and state.latents.shape[2:] == (8, 12)


def test_pipelines_made_from_it_serve_all_tasks_too(pipeline: Any, denoiser: Denoiser) -> None:
    other = Denoiser(StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False))
    assert torch.equal(
        finish(other, begin(other, [1], **SMALL)), finish(denoiser, begin(denoiser, [1], **SMALL))
    )


@pytest.mark.parametrize(("call", "param"), [({}, "image"), ({"image": PICTURE}, "mask_image")])
def test_a_network_that_takes_a_mask_draws_nothing_without_one(call: dict[str, Any], param: str) -> None:
    pipeline = tiny_sd15(in_channels=9)
    with pytest.raises(InvalidRequest, match="needs an image and a mask_image") as error:
        begin(Denoiser(pipeline), [1], **SMALL, **call)
    assert error.value.param == param


def test_a_state_of_sdxl_does_not_go_on_here(denoiser: Denoiser) -> None:
    blob = begin(Denoiser(tiny_sdxl()), [1], **SMALL).to_bytes()
    with pytest.raises(
        InvalidRequest, match="StableDiffusionXL cannot go on with a model of StableDiffusion$"
    ):
        denoiser.step(DenoiseState.from_bytes(blob))


# In gangs

TALL = {"prompt": "a lake", "height": 136, "width": 96, "num_inference_steps": 8, "guidance_scale": 5.0}
NEAR = 1e-4
"""Of the largest value: what other sums of the same numbers may differ by."""


def changing_gangs(
    make: Callable[..., Any], scheduler: str, config: ParallelConfig
) -> tuple[Any, list[bool]]:
    """Steps 1-3 by rank 0, 4-6 by both ranks, 7 and on by rank 1: the latents, and which steps were fresh.

    A state moves as bytes.
    """
    pipelines, fresh = [make(), make()], [False] * 0

    def rank(communicator: Communicator) -> torch.Tensor | None:
        here = communicator.rank
        pipeline = parallelize(pipelines[here], connect("local"), config)
        denoiser, engine = Denoiser(pipeline), engine_of(pipeline)
        assert engine is not None

        def steps(state: DenoiseState, count: int) -> None:
            for _ in range(count):
                denoiser.step(state)
                if here == 1 or state.step <= 3:
                    fresh.append(engine.statistics.synchronous)

        if here == 0:
            state = begin(denoiser, [1], **TALL, scheduler=scheduler)
            steps(state, 3)
            blobs.append(state.to_bytes())
        all_gather(communicator, [torch.zeros(1), torch.zeros(1)]).wait()  # rank 1 waits for rank 0
        state = DenoiseState.from_bytes(blobs[0])
        parallelize(pipeline, communicator, config)
        steps(state, 3)
        if here == 0:
            return None
        parallelize(pipeline, connect("local"), config)
        steps(state, state.num_steps - 6)
        return state.latents

    blobs: list[bytes] = []
    return run_in_lockstep(2, rank)[1], fresh


@pytest.mark.parametrize(
    ("model", "scheduler", "halves"),
    sweep(
        [
            ("1.5", "pndm", True),
            ("2.1", "dpmpp-2m", False),
            ("1.5", "ddim", False),
            ("1.5", "euler-ancestral", True),
            ("2.1", "heun", False),
            ("2.1", "ddim", True),
        ],
        first=2,
    ),
)
def test_changing_gangs_in_sync_mode_equal_one_device(model: str, scheduler: str, halves: bool) -> None:
    config = ParallelConfig(exchange="sync", cfg_parallel=halves)
    latents, _ = changing_gangs(MODELS[model], scheduler, config)
    alone = Denoiser(MODELS[model]())
    expected = finish(alone, begin(alone, [1], **TALL, scheduler=scheduler))
    assert (latents - expected).abs().max() <= NEAR * expected.abs().max()


def test_changing_gangs_in_displaced_mode_start_with_one_fresh_step() -> None:
    config = ParallelConfig(exchange="displaced", warmup_steps=1, cfg_parallel=False)
    latents, fresh = changing_gangs(tiny_sd15, "pndm", config)
    assert fresh == [True, True, True, True, False, False, True, True, True], "alone, all are"
    assert latents.isfinite().all()


def test_who_survives_a_gang_goes_on_with_the_step_that_it_holds() -> None:
    config, pipelines = ParallelConfig(exchange="sync"), [tiny_sd21(), tiny_sd21()]

    def rank(communicator: Communicator) -> torch.Tensor | None:
        pipeline = parallelize(pipelines[communicator.rank], communicator, config)
        denoiser = Denoiser(pipeline)
        state = begin(denoiser, [1], **TALL, scheduler="dpmpp-2m")
        for _ in range(4):
            denoiser.step(state)
        if communicator.rank == 1:
            communicator.abort()
            return None
        with pytest.raises(GangBroken):
            denoiser.step(state)
        assert state.step == 4
        parallelize(pipeline, connect("local"), config)
        return finish(denoiser, state)

    latents, alone = run_in_lockstep(2, rank)[0], Denoiser(tiny_sd21())
    expected = finish(alone, begin(alone, [1], **TALL, scheduler="dpmpp-2m"))
    assert latents is not None and (latents - expected).abs().max() <= NEAR * expected.abs().max()


def test_a_gang_of_runners_draws_the_picture_of_one(tmp_path: Path) -> None:
    pipeline = tiny_sd21()
    pipeline.register_modules(**tiny_safety_checker())
    pipeline.save_pretrained(tmp_path)
    gang = Gang(tmp_path, 2)
    assert sizes_of(ModelSpec(name=str(tmp_path))) == Sizes((128, 128), unit=8, latent_row=8)
    facts = gang.runners[0].facts()
    assert (facts.default_size, facts.size_unit, facts.row_unit) == ((128, 128), 8, 64)
    assert facts.terms == terms_of(ModelSpec(name=str(tmp_path)))
    together, alone = gang.run(guidance_rescale=0.5), gang.run(link="alone", guidance_rescale=0.5)
    (picture,), (other,) = together[0].images or (), alone[0].images or ()
    assert np.abs(np.array(picture, int) - np.array(other, int)).max() <= 1
    assert any(high for _, high in picture.getextrema())
    for runner in gang.runners:  # every worker has the folder's safety checker, and decides alike
        runner.pipeline.safety_checker.concept_embeds_weights.data.fill_(-2.0)
    (black,) = gang.run()[0].images or ()
    assert not any(high for _, high in black.getextrema())


@pytest.mark.ray
@pytest.mark.slow
def test_the_command_line_draws_a_saved_model_with_two_workers(tmp_path: Path) -> None:
    pipeline = tiny_sd15()
    pipeline.save_pretrained(tmp_path / "model")
    out = tmp_path / "lake.png"
    options = {"model": tmp_path / "model", "out": out, "gang-size": 2, "exchange": "sync", "seed": 3,
               "height": 136, "width": 96, "num-inference-steps": 4, "cpus": 2}  # fmt: skip
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    command = [sys.executable, "-m", "distriray", "generate", "a lake", *flags]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    call = {"height": 136, "num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "pil"}
    (expected,) = ordinary(pipeline, None, [3], **call)
    assert np.abs(np.array(Image.open(out), int) - np.array(expected, int)).max() <= 1
