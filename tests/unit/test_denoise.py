"""A request step by step: the ordinary pipeline's numbers, and a state that survives as bytes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    DDPMScheduler,
    DEISMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    KDPM2DiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
)
from PIL import Image

from distriray import parallelize
from distriray.collective import connect
from distriray.denoise import SCHEDULERS, Denoiser, DenoiseState
from distriray.denoise.pipelines.families.sdxl import StableDiffusionXL
from distriray.denoise.pipelines.registry import PIPELINES, PipelineFamily
from distriray.denoise.pipelines.sizes import Sizes
from distriray.denoise.schedulers import make_scheduler, step_count
from distriray.errors import GangBroken, GenerationCancelled, InvalidRequest, NotFinite, UnsupportedModel
from distriray.parallel import engine_of
from distriray.requests import SamplingParams
from distriray.steps import SchedulerName, StepCount
from tests.models import SHALLOW, tiny_sd15, tiny_sd21, tiny_sdxl
from tests.parameters import sweep

SIZE = {"height": 64, "width": 96}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_sdxl(**SHALLOW)


@pytest.fixture(scope="module")
def denoiser(pipeline: Any) -> Denoiser:
    return Denoiser(pipeline)


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def begin(denoiser: Denoiser, seeds: list[int], **fields: Any) -> DenoiseState:
    """Those fields prepared, with consecutive seeds."""
    params = SamplingParams(**{"seed": seeds[0], "num_images": len(seeds), **fields})
    return denoiser.prepare(params)


def finish(denoiser: Denoiser, state: DenoiseState) -> torch.Tensor:
    while not state.done:
        denoiser.step(state)
    return state.latents


def finish_through_bytes(denoiser: Denoiser, state: DenoiseState) -> torch.Tensor:
    """The last latents where each step goes on from the bytes of the one before; `state` stays as it is."""
    while not state.done:
        state = DenoiseState.from_bytes(state.to_bytes())
        denoiser.step(state)
    return state.latents


def ordinary(pipeline: Any, scheduler: str | None, seeds: list[int], **call: Any) -> torch.Tensor:
    """diffusers' own loop with a scheduler of that name."""
    before = pipeline.scheduler
    if scheduler is not None:
        kind, options = SCHEDULERS[scheduler]
        pipeline.scheduler = kind.from_config(before.config, **options)
    try:
        return pipeline(
            "a lake",
            num_images_per_prompt=len(seeds),
            generator=generators(seeds),
            **{"output_type": "latent", **SIZE, **call},
        ).images
    finally:
        pipeline.scheduler = before


@pytest.mark.parametrize("scheduler", sweep(sorted(SCHEDULERS), first=3))
def test_steps_by_hand_equal_the_ordinary_pipeline_also_through_bytes(
    pipeline: Any, denoiser: Denoiser, scheduler: str
) -> None:
    call = {"num_inference_steps": 5, "guidance_scale": 5.0}
    expected = ordinary(pipeline, scheduler, [1, 2], **call)
    state = begin(denoiser, prompt="a lake", seeds=[1, 2], scheduler=scheduler, **SIZE, **call)
    carried = finish_through_bytes(denoiser, state)
    torch.testing.assert_close(finish(denoiser, state), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(carried, state.latents)


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0},
        {"guidance_scale": 4.0, "guidance_rescale": 0.7},
        {"guidance_scale": 4.0, "negative_prompt": "fog"},
    ],
)
def test_guidance_is_the_pipelines(pipeline: Any, denoiser: Denoiser, call: dict[str, Any]) -> None:
    call = {"num_inference_steps": 3, **call}
    state = begin(denoiser, prompt="a lake", seeds=[3], **SIZE, **call)
    torch.testing.assert_close(
        finish(denoiser, state), ordinary(pipeline, None, [3], **call), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("negative_prompt", [None, "fog"])
def test_clip_skip_is_the_ordinary_pipelines(
    pipeline: Any, denoiser: Denoiser, skip: int, negative_prompt: str | None
) -> None:
    call = {"num_inference_steps": 3, "negative_prompt": negative_prompt, "clip_skip": skip}
    state = begin(denoiser, [3], prompt="a lake", **SIZE, **call)
    own = begin(denoiser, [3], prompt="a lake", **SIZE, **{**call, "clip_skip": None})
    embeds, negative, pooled, _ = pipeline.encode_prompt(
        "a lake", negative_prompt=negative_prompt, clip_skip=skip
    )
    assert torch.equal(state.values["prompt_embeds"], embeds)
    assert torch.equal(state.values["negative_prompt_embeds"], negative)
    assert torch.equal(state.values["pooled_prompt_embeds"], pooled)
    assert torch.equal(own.values["prompt_embeds"], embeds) == (skip == 0)
    (expected,) = ordinary(pipeline, None, [3], guidance_scale=5.0, output_type="np", **call)
    finish(denoiser, state)
    np.testing.assert_allclose(np.array(denoiser.decode(state)[0]) / 255, expected, atol=1 / 255)


PICTURE = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
ON_PICTURE: dict[str, Any] = {
    "image": PICTURE,
    "strength": 0.8,
    "num_inference_steps": 6,
    "guidance_scale": 5.0,
}


@pytest.mark.parametrize("channels", [4, 8])
def test_image_to_image_equals_the_ordinary_pipeline(channels: int) -> None:
    pipeline = tiny_sdxl(latent_channels=channels)
    denoiser, other = Denoiser(pipeline), AutoPipelineForImage2Image.from_pipe(pipeline)
    other.set_progress_bar_config(disable=True)
    expected = other("x", generator=generators([1]), output_type="latent", **ON_PICTURE).images
    state = begin(denoiser, prompt="x", seeds=[1], **SIZE, **ON_PICTURE)
    torch.testing.assert_close(finish(denoiser, state), expected, rtol=1e-4, atol=1e-4)


MASK = Image.new("L", (96, 64), 0)
MASK.paste(255, (0, 0, 48, 64))


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("scheduler", sweep(["euler-ancestral", "ddim", "dpmpp-2m", "heun"]))
def test_inpainting_equals_the_ordinary_pipeline_also_through_bytes(channels: int, scheduler: str) -> None:
    pipeline = tiny_sdxl(in_channels=channels)
    denoiser, other = Denoiser(pipeline), AutoPipelineForInpainting.from_pipe(pipeline)
    kind, options = SCHEDULERS[scheduler]
    other.scheduler = kind.from_config(pipeline.scheduler.config, **options)
    other.set_progress_bar_config(disable=True)
    expected = other(
        "x", mask_image=MASK, generator=generators([1]), output_type="latent", **SIZE, **ON_PICTURE
    ).images
    state = begin(denoiser, prompt="x", seeds=[1], mask_image=MASK, scheduler=scheduler, **SIZE, **ON_PICTURE)
    denoiser.step(state)
    carried = DenoiseState.from_bytes(state.to_bytes())
    latents = finish(denoiser, state)
    assert torch.equal(finish(denoiser, carried), latents)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_a_network_that_takes_a_mask_draws_from_noise_alone_as_the_ordinary_pipeline() -> None:
    """Which draws nothing for a picture that neither the noise nor the network begins from."""
    pipeline = tiny_sdxl(**SHALLOW, in_channels=9)
    denoiser, other = Denoiser(pipeline), AutoPipelineForInpainting.from_pipe(pipeline)
    other.set_progress_bar_config(disable=True)
    call = {"image": PICTURE, "mask_image": MASK, "num_inference_steps": 2, "guidance_scale": 5.0, **SIZE}
    expected = other("x", generator=generators([1]), strength=1.0, output_type="latent", **call).images
    latents = finish(denoiser, begin(denoiser, prompt="x", seeds=[1], **call))
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_keeps_the_rest_with_latents_of_any_width(strength: float) -> None:
    denoiser = Denoiser(tiny_sdxl(latent_channels=8))  # which the ordinary inpainting pipeline refuses
    call = {**ON_PICTURE, **SIZE, "strength": strength}
    state = begin(denoiser, prompt="x", seeds=[1], mask_image=MASK, **call)
    latents, kept = finish(denoiser, state), state.values["image_latents"]
    assert torch.equal(latents[..., 6:], kept[..., 6:])
    assert not torch.allclose(latents[..., :6], kept[..., :6], atol=0.1)


@pytest.mark.parametrize("call", [{}, ON_PICTURE, {**ON_PICTURE, "mask_image": MASK}])
def test_an_image_does_not_depend_on_its_batch(denoiser: Denoiser, call: dict[str, Any]) -> None:
    call = {"num_inference_steps": 3, "scheduler": "euler-ancestral", **SIZE, **call}
    together = begin(denoiser, prompt="a lake", seeds=[1, 2, 3], **call)
    alone = begin(denoiser, prompt="a lake", seeds=[2], **call)
    torch.testing.assert_close(finish(denoiser, together)[1:2], finish(denoiser, alone), rtol=1e-4, atol=1e-4)


def test_states_take_turns_on_one_denoiser(denoiser: Denoiser) -> None:
    def fresh(prompt: str, scale: float) -> DenoiseState:
        return begin(denoiser, prompt=prompt, seeds=[1], num_inference_steps=3, guidance_scale=scale, **SIZE)

    apart = [finish(denoiser, fresh("a lake", 5.0)), finish(denoiser, fresh("a hill", 1.0))]
    states = [fresh("a lake", 5.0), fresh("a hill", 1.0)]
    for _ in range(3):
        for state in states:
            denoiser.step(state)
    assert all(torch.equal(s.latents, expected) for s, expected in zip(states, apart, strict=True))


def test_a_failed_step_leaves_the_state_as_it_was() -> None:
    pipeline = parallelize(tiny_sdxl(), connect("local"))
    denoiser = Denoiser(pipeline)
    options: dict[str, Any] = {"num_inference_steps": 5, "scheduler": "euler-ancestral"}
    expected = finish(denoiser, begin(denoiser, prompt="x", seeds=[1], **options, **SIZE))
    state = begin(denoiser, prompt="x", seeds=[1], **options, **SIZE)
    for _ in range(2):
        denoiser.step(state)
    engine = engine_of(pipeline)
    assert engine is not None
    engine.ask_cancel()
    with pytest.raises(GenerationCancelled):
        denoiser.step(state)
    assert state.step == 2
    assert torch.equal(finish(denoiser, state), expected)


def test_pictures_and_previews(denoiser: Denoiser) -> None:
    state = begin(denoiser, prompt="x", seeds=[1, 2], num_inference_steps=2, height=192, width=256)
    denoiser.step(state)
    assert denoiser.preview(state).size == (64, 48)
    denoiser.step(state)
    assert [image.size for image in denoiser.decode(state)] == [(256, 192)] * 2
    with pytest.raises(ValueError, match="all 2 steps are done"):
        denoiser.step(state)


@contextmanager
def failing_at_the_end(owner: Any, name: str) -> Iterator[None]:
    """Let a method do its work and raise `GangBroken` then."""
    work = getattr(owner, name)

    def fail(*inputs: Any, **options: Any) -> None:
        work(*inputs, **options)
        raise GangBroken("at the very end")

    setattr(owner, name, fail)
    try:
        yield
    finally:
        vars(owner).pop(name, None)


@pytest.mark.parametrize("scheduler", sweep(sorted(SCHEDULERS), first=4))
@pytest.mark.parametrize("part", ["unet", "scheduler"])
def test_whatever_fails_the_state_stays(denoiser: Denoiser, scheduler: str, part: str) -> None:
    state = begin(denoiser, prompt="x", seeds=[1], num_inference_steps=4, scheduler=scheduler, **SIZE)
    unet = denoiser._pipeline.unet
    for done in range(state.num_steps):
        owner, name = (unet, "forward") if part == "unet" else (state.scheduler, "step")
        before = state.to_bytes()
        with failing_at_the_end(owner, name), pytest.raises(GangBroken):
            denoiser.step(state)
        assert state.step == done
        assert state.to_bytes() == before
        denoiser.step(state)


def signed(blob: bytes, old: bytes, new: bytes) -> bytes:
    """Those bytes with something replaced, and a checksum that agrees."""
    content = blob.split(b"\n", 1)[1][16:]
    assert old in content and len(old) == len(new)
    content = content.replace(old, new)
    return blob.split(b"\n", 1)[0] + b"\n" + hashlib.blake2b(content, digest_size=16).digest() + content


def test_broken_bytes_are_refused(denoiser: Denoiser) -> None:
    blob = begin(denoiser, prompt="x", seeds=[1], num_inference_steps=2, **SIZE).to_bytes()
    assert DenoiseState.from_bytes(signed(blob, b"a", b"a")).step == 0
    flipped = [bytearray(blob) for _ in range(4)]
    for copy, place in zip(flipped, (20, 40, len(blob) // 2, len(blob) - 1), strict=True):
        copy[place] ^= 1
    for broken in (b"", b"nonsense", blob[:30], blob[:-10], blob[: len(blob) // 2], *map(bytes, flipped)):
        with pytest.raises(InvalidRequest, match=r"damaged|not a saved state"):
            DenoiseState.from_bytes(broken)
    for forged, complaint in (
        (blob.replace(b"state 5", b"state 9", 1), "version"),
        (signed(blob, b"EulerDiscreteScheduler", b"EulerDiscreteSchedulex"), "EulerDiscreteSchedulex cannot"),
        (signed(blob, b'\\"_begin_index\\"', b'\\"scale_noises\\"'), "differs"),
        (signed(blob, b'\\"_begin_index\\"', b'\\"add_noise\\"   '), "differs"),
        (signed(blob, b'\\"task\\"', b'\\"tusk\\"'), "KeyError"),
    ):
        with pytest.raises(InvalidRequest, match=complaint):
            DenoiseState.from_bytes(forged)


def test_what_cannot_be_saved_is_an_error(denoiser: Denoiser) -> None:
    state = begin(denoiser, prompt="x", seeds=[1], num_inference_steps=2, **SIZE)
    state.scheduler.memo = [len]  # print is replaced where Ray runs
    with pytest.raises(TypeError, match="scheduler/memo/0 is a builtin_function"):
        state.to_bytes()


@pytest.mark.distributed
def test_another_process_goes_on_with_the_same_bits(denoiser: Denoiser, tmp_path: Path) -> None:
    expected = {}
    for scheduler in SCHEDULERS:
        state = begin(denoiser, prompt="x", seeds=[1, 2], num_inference_steps=4, scheduler=scheduler, **SIZE)
        while not state.done:
            (tmp_path / f"{scheduler} {state.step}").write_bytes(state.to_bytes())
            denoiser.step(state)
        expected[scheduler] = state.latents
    context = get_context("spawn")
    with context.Pool(1, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        finals = pool.apply(finish_saved, (tmp_path,))
    for name, latents in finals.items():
        assert np.array_equal(latents, expected[name.split()[0]].numpy()), name
    assert len(finals) >= 4 * len(SCHEDULERS)


def finish_saved(folder: Path) -> dict[str, np.ndarray]:
    denoiser = Denoiser(tiny_sdxl(**SHALLOW))
    return {
        file.name: finish(denoiser, DenoiseState.from_bytes(file.read_bytes())).numpy()
        for file in folder.iterdir()
    }


def test_all_tensors_of_a_state_move_with_it_but_those_that_the_host_looks_numbers_up_in(
    denoiser: Denoiser,
) -> None:
    state = begin(denoiser, [1], prompt="a lake", scheduler="dpmpp-2m", **SIZE)
    denoiser.step(state)
    state.values["nested"] = [{"texts": (torch.zeros(2), "plain")}]
    state.to("meta")
    (nested,) = state.values["nested"]
    tensor, plain = nested["texts"]
    assert tensor.is_meta and plain == "plain" and state.latents.is_meta
    assert state.scheduler.model_outputs[-1].is_meta
    assert not (state.values["timesteps"].is_meta or state.scheduler.sigmas.is_meta)


def test_a_yielded_state_goes_on_in_the_same_gang() -> None:
    pipeline = parallelize(tiny_sdxl(), connect("local"))
    denoiser, engine = Denoiser(pipeline), engine_of(pipeline)
    assert engine is not None
    state = begin(denoiser, prompt="x", seeds=[1], num_inference_steps=4, **SIZE)
    engine.ask_yield()
    denoiser.step(state)
    assert engine.yielding
    denoiser.step(state)
    assert not engine.yielding


@pytest.mark.parametrize(
    ("call", "param"),
    [
        ({"num_images": 0}, "num_images"),
        ({"seed": None}, "seed"),
        ({"scheduler": "magic"}, "scheduler"),
        ({"clip_skip": -1}, "clip_skip"),
        ({"clip_skip": 2}, "clip_skip"),
        ({"mask_image": Image.new("L", (96, 64))}, "mask_image"),
        ({"strength": 0.5}, "strength"),
        ({"strength": 0.0}, "strength"),
        ({"height": 60}, "height"),
        ({"width": 0, "height": 8}, "width"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"image": PICTURE, "strength": 0.1, "num_inference_steps": 2}, "strength"),
        ({"image": PICTURE, "strength": 0.1, "num_inference_steps": 2, "num_images": 2}, "strength"),
    ],
)
def test_bad_input_names_its_field(denoiser: Denoiser, call: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        begin(denoiser, **{"prompt": "x", "seeds": [1], **SIZE, **call})
    assert error.value.param == param


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
@pytest.mark.parametrize("steps", [51, 999, 1000])
def test_more_steps_than_a_scheduler_takes_are_refused_before_anything_is_drawn(
    denoiser: Denoiser, scheduler: str, steps: int
) -> None:
    """And what is not refused can be stepped from either end of the schedule."""
    try:
        state = begin(
            denoiser,
            prompt="x",
            seeds=[1],
            num_inference_steps=steps,
            scheduler=scheduler,
            height=16,
            width=16,
        )
    except InvalidRequest as error:
        assert str(steps) in str(error) and (scheduler == "lcm" or steps > 51)
        return
    denoiser.step(state)
    assert state.estimate is not None and torch.isfinite(state.estimate).all()


def test_schedulers_are_those_that_a_request_may_name() -> None:
    assert len(SCHEDULERS) > 5 and list(SCHEDULERS) == list(get_args(SchedulerName))


OTHERS: dict[str, Any] = {
    "prompt": "a hill",
    "negative_prompt": "fog",
    "prompt_2": "a hill",
    "negative_prompt_2": "fog",
    "prompt_3": "a hill",
    "negative_prompt_3": "fog",
    "original_size": "640x480",
    "crops_coords_top_left": "300,20",
    "target_size": "640x480",
    "height": 72,
    "width": 104,
    "num_inference_steps": 4,
    "guidance_scale": 4.0,
    "guidance_rescale": 0.7,
    "guidance_end": 0.5,
    "seed": 2,
    "num_images": 2,
    "scheduler": "euler-ancestral",
    "clip_skip": 1,
    "control": [{"name": "canny", "image": PICTURE}],
    "ip_adapters": [{"name": "style", "image": PICTURE}],
    "references": [{"image": PICTURE}],
    "image": PICTURE,
    "mask_image": MASK,
    "strength": 0.9,
}
OF_AN_IMAGE: dict[str, dict[str, Any]] = dict.fromkeys(("mask_image", "strength"), {"image": PICTURE})
"""What some fields need beside them."""
OF_THE_NETWORK = sorted(SamplingParams.model_fields.keys() - {"loras", "control", "ip_adapters"})
"""The others are in test_adapters.py, test_control.py and test_ip_adapters.py."""


def refuses(denoiser: Denoiser, plain: dict[str, Any], field: str) -> None:
    """Hold a denoiser to refusing what its model has nothing for, by name."""
    with pytest.raises(InvalidRequest, match=f"^{field}: .*; leave it out$") as error:
        denoiser.prepare(SamplingParams(**{**plain, field: OTHERS[field]}))
    assert error.value.param == field


@pytest.mark.parametrize("field", OF_THE_NETWORK)
def test_every_field_decides_the_picture_or_is_refused_by_name(denoiser: Denoiser, field: str) -> None:
    plain = {"prompt": "a lake", "seed": 1, "num_inference_steps": 3, **SIZE, **OF_AN_IMAGE.get(field, {})}
    if field in denoiser.terms.lacks:
        refuses(denoiser, plain, field)
        return
    usual, other = (
        finish(denoiser, denoiser.prepare(SamplingParams(**fields)))
        for fields in (plain, {**plain, field: OTHERS[field]})
    )
    assert usual.shape != other.shape or not torch.allclose(usual, other, rtol=1e-3, atol=1e-3)


UNKNOWN = [DEISMultistepScheduler, DDPMScheduler, EDMEulerScheduler, KDPM2DiscreteScheduler, TCDScheduler]


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_model_with_a_scheduler_that_no_state_can_hold_is_refused_at_once(kind: Any) -> None:
    pipeline = tiny_sdxl()
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    with pytest.raises(UnsupportedModel, match=rf"own scheduler {kind.__name__} .* there are ddim"):
        Denoiser(pipeline)


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_a_request_knows_how_many_steps_its_state_will_have(
    denoiser: Denoiser, scheduler: SchedulerName, steps: int
) -> None:
    params = SamplingParams(prompt="x", seed=1, scheduler=scheduler, num_inference_steps=steps, **SIZE)
    assert params.num_steps(denoiser.own_steps) == denoiser.prepare(params).num_steps


@pytest.mark.parametrize("strength", [0.07, 0.29, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_a_request_knows_how_many_steps_are_done_on_its_image(
    denoiser: Denoiser, scheduler: SchedulerName, strength: float
) -> None:
    # of 100, 0.29 and 0.07 are a hair from a whole number
    for steps in (1, 2, 7, 30, *([] if scheduler == "lcm" else [100])):
        params = SamplingParams(
            prompt="x",
            seed=1,
            scheduler=scheduler,
            num_inference_steps=steps,
            image=PICTURE,
            strength=strength,
        )
        try:
            known = params.num_steps(denoiser.own_steps, rounds_up=denoiser.terms.rounds_up)
        except InvalidRequest as error:
            with pytest.raises(InvalidRequest, match="leaves none to do"):
                denoiser.prepare(params)
            would_do = float(re.search(r"use ([0-9.]+) or more", str(error))[1])
            least = params.model_copy(update={"strength": would_do})
            assert denoiser.prepare(least).num_steps == least.num_steps(denoiser.own_steps)
        else:
            assert known == denoiser.prepare(params).num_steps


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
@pytest.mark.parametrize("own", sorted(SCHEDULERS))
def test_without_a_scheduler_a_request_has_the_steps_of_the_models_own(
    own: SchedulerName, steps: int
) -> None:
    pipeline = tiny_sdxl()
    pipeline.scheduler = make_scheduler(pipeline.scheduler, own)
    denoiser = Denoiser(pipeline)
    params = SamplingParams(prompt="x", seed=1, num_inference_steps=steps, **SIZE)
    assert params.num_steps(denoiser.own_steps) == denoiser.prepare(params).num_steps


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("model", [tiny_sdxl, tiny_sd15])
def test_a_picture_that_would_be_black_is_refused_by_name(model: Any, bad: float) -> None:
    pipeline = model()
    denoiser = Denoiser(pipeline)
    state = prepared(denoiser, "a lake", scheduler="unipc")
    denoiser.step(state)
    state.latents[0, 0, 1, 1] = bad
    says = "the latents after step 1 of 2 by UniPCMultistepScheduler hold infinities or NaN"
    for make in (denoiser.decode, denoiser.preview):
        with pytest.raises(NotFinite, match=says):
            make(state)
    state.latents[0, 0, 1, 1] = 0.0
    denoiser.decode(state)
    pipeline.vae.decoder.conv_out.bias.data[0] = float("nan")
    with pytest.raises(NotFinite, match="the decoded pixels .* float32 or bfloat16"):
        denoiser.decode(state)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("scheduler", ["unipc", "dpmpp-2m", "dpmpp-2s"])
def test_steps_between_equal_noise_levels_are_refused(scheduler: SchedulerName, spacing: str) -> None:
    pipeline = tiny_sdxl()
    pipeline.scheduler = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, timestep_spacing=spacing
    )
    params = SamplingParams(prompt="x", seed=1, scheduler=scheduler, num_inference_steps=1000, **SIZE)
    with pytest.raises(InvalidRequest, match="1000 is too many .* twice") as refused:
        Denoiser(pipeline).prepare(params)
    assert refused.value.param == "num_inference_steps"
    Denoiser(pipeline).prepare(params.model_copy(update={"num_inference_steps": 998}))


@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp-2m-karras", "euler", "heun", "lms", "pndm"])
def test_as_many_steps_as_there_are_noise_levels_are_taken_where_all_differ(scheduler: SchedulerName) -> None:
    params = SamplingParams(prompt="x", seed=1, scheduler=scheduler, num_inference_steps=999, **SIZE)
    Denoiser(tiny_sdxl()).prepare(params)


MADE = {"xl": tiny_sdxl, "1.5": tiny_sd15, "2.1": tiny_sd21}


def prepared(denoiser: Denoiser, prompt: str, **fields: Any) -> DenoiseState:
    return denoiser.prepare(SamplingParams(prompt=prompt, seed=1, num_inference_steps=2, **SIZE, **fields))


@pytest.mark.parametrize("model", MADE)
def test_a_prompt_that_is_cut_is_said_to_be_and_one_that_just_fits_is_not(model: str) -> None:
    def embeds(prompt: str) -> torch.Tensor:
        found: torch.Tensor = prepared(denoiser, prompt).values["prompt_embeds"]
        return found

    denoiser, fits = Denoiser(MADE[model]()), "x" * 75  # a token a letter
    assert prepared(denoiser, fits).warnings == () and prepared(denoiser, "").warnings == ()
    says = "prompt has 90 tokens, and a text encoder takes 75: the rest is not used"
    cut = prepared(denoiser, fits + "y" * 15)
    assert cut.warnings == (says,) and DenoiseState.from_bytes(cut.to_bytes()).warnings == (says,)
    assert torch.equal(embeds(fits + "y" * 15), embeds(fits + "z" * 9)), "and it is cut"
    both = prepared(denoiser, fits + "y", negative_prompt="n" * 80)
    assert [warning[:26] for warning in both.warnings] == [
        "prompt has 76 tokens, and ", "negative_prompt has 80 tok",
    ]  # fmt: skip
    unguided = prepared(denoiser, fits, negative_prompt="n" * 80, guidance_scale=1.0)
    assert unguided.warnings == ("negative_prompt is not used with a guidance_scale of 1",)
    rescaled = prepared(denoiser, fits, guidance_scale=1.0, guidance_rescale=0.5)
    assert rescaled.warnings == ("guidance_rescale is not used with a guidance_scale of 1",)


@pytest.mark.parametrize("model", MADE)
def test_a_word_of_several_vectors_counts_as_many_tokens(model: str) -> None:
    pipeline = MADE[model]()
    for tokenizer in {pipeline.tokenizer, getattr(pipeline, "tokenizer_2", pipeline.tokenizer)}:
        tokenizer.add_tokens(["<cat>", "<cat>_1", "<cat>_2"])
    for encoder in {pipeline.text_encoder, getattr(pipeline, "text_encoder_2", pipeline.text_encoder)}:
        encoder.resize_token_embeddings(len(pipeline.tokenizer))
    denoiser = Denoiser(pipeline)
    assert prepared(denoiser, "x" * 71 + " <cat>").warnings == ()
    assert "prompt has 76 tokens" in prepared(denoiser, "x" * 73 + " <cat>").warnings[0]


def test_a_scheduler_whose_timesteps_depend_on_the_size_is_taken_to_make_one_call_a_step() -> None:
    assert step_count(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)) == StepCount()


@pytest.mark.parametrize("distilled", [False, True])
def test_a_second_branch_is_taken_by_guidance_but_not_where_the_network_takes_its_scale(
    distilled: bool,
) -> None:
    pipeline = tiny_sdxl(**({"time_cond_proj_dim": 8} if distilled else {}))
    denoiser, batches = Denoiser(pipeline), []
    pipeline.unet.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    for scale in (5.0, 1.0):
        params = SamplingParams(prompt="x", seed=1, num_inference_steps=1, guidance_scale=scale, **SIZE)
        denoiser.step(denoiser.prepare(params))
    assert denoiser.guides is not distilled
    assert batches == [1 + denoiser.guides, 1]


def test_the_refiner_is_refused() -> None:
    parts = {**tiny_sdxl().components, "text_encoder": None, "tokenizer": None}
    refiner = StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True, add_watermarker=False)
    with pytest.raises(UnsupportedModel, match="refiner"):
        Denoiser(refiner)


def test_a_network_that_takes_a_mask_draws_nothing_without_one() -> None:
    denoiser = Denoiser(tiny_sdxl(in_channels=9))
    assert denoiser.terms.needs_mask
    with pytest.raises(InvalidRequest, match="needs an image and a mask_image"):
        begin(denoiser, prompt="x", seeds=[1], **SIZE)


def test_other_pipelines_are_refused_with_a_list_of_what_is_supported() -> None:
    """Also one around SDXL's models: what it does besides would be lost."""
    listed = r"supported are .*Stable Diffusion XL \(StableDiffusionXLPipeline, StableDiffusionXLImg"
    with pytest.raises(UnsupportedModel, match=f"StableDiffusionXLPAGPipeline cannot .*{listed}"):
        Denoiser(StableDiffusionXLPAGPipeline(**tiny_sdxl().components, add_watermarker=False))
    with pytest.raises(UnsupportedModel, match=f"StableDiffusionXLPipeline cannot .*{listed}"):
        Denoiser(type("StableDiffusionXLPipeline", (), {})())  # has only the name


class MuralPipeline(StableDiffusionXLPipeline):
    """One of a family with sizes of its own."""


class Mural(StableDiffusionXL):
    kinds = (MuralPipeline,)


@pytest.fixture
def mural(monkeypatch: pytest.MonkeyPatch) -> Denoiser:
    sizes = Sizes((48, 80), unit=16, latent_row=8)
    monkeypatch.setitem(
        PIPELINES, "Mural", PipelineFamily(f"{__name__}:Mural", "murals", lambda config: sizes)
    )
    return Denoiser(MuralPipeline(**tiny_sdxl().components, add_watermarker=False))


def test_sizes_are_the_familys(mural: Denoiser) -> None:
    state = begin(mural, [1], prompt="x", num_inference_steps=2)
    assert (state.height, state.width) == (48, 80) and state.latents.shape[2:] == (6, 10)
    with pytest.raises(InvalidRequest, match="height 72 is not a multiple of 16; use 64 or 80"):
        begin(mural, [1], prompt="x", height=72)


def test_default_sizes_need_not_be_square() -> None:
    assert Denoiser(tiny_sdxl(sample_size=(8, 12))).sizes.default == (64, 96)


def test_a_state_goes_on_with_its_own_family_only(denoiser: Denoiser, mural: Denoiser) -> None:
    blob = begin(mural, [1], prompt="x", num_inference_steps=2).to_bytes()
    state = DenoiseState.from_bytes(blob)
    for verb in (denoiser.step, denoiser.decode, denoiser.preview):
        with pytest.raises(InvalidRequest, match="state of Mural cannot go on with a model of StableDiffu"):
            verb(state)
    mural.step(state)
    assert state.step == 1
