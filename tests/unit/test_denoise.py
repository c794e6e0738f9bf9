"""A request step by step: the ordinary pipeline's numbers, and a state that survives as bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting
from PIL import Image

from distriray import parallelize
from distriray.collective import connect
from distriray.denoise import SCHEDULERS, Denoiser, DenoiseState
from distriray.errors import GenerationCancelled, InvalidRequest, UnsupportedModel
from distriray.parallel import engine_of
from tests.models import tiny_sd15, tiny_sdxl

SIZE = {"height": 64, "width": 96}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_sdxl()


@pytest.fixture(scope="module")
def denoiser(pipeline: Any) -> Denoiser:
    return Denoiser(pipeline)


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def finish(denoiser: Denoiser, state: DenoiseState) -> torch.Tensor:
    while not state.done:
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
            output_type="latent",
            **SIZE,
            **call,
        ).images
    finally:
        pipeline.scheduler = before


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_steps_by_hand_equal_the_ordinary_pipeline_also_through_bytes(
    pipeline: Any, denoiser: Denoiser, scheduler: str
) -> None:
    call = {"num_inference_steps": 5, "guidance_scale": 5.0}
    expected = ordinary(pipeline, scheduler, [1, 2], **call)
    state = denoiser.prepare(prompt="a lake", seeds=[1, 2], scheduler=scheduler, **SIZE, **call)
    carried = DenoiseState.from_bytes(state.to_bytes())
    torch.testing.assert_close(finish(denoiser, state), expected, rtol=1e-4, atol=1e-4)
    while not carried.done:
        carried = DenoiseState.from_bytes(carried.to_bytes())
        denoiser.step(carried)
    assert torch.equal(carried.latents, state.latents)


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
    state = denoiser.prepare(prompt="a lake", seeds=[3], **SIZE, **call)
    torch.testing.assert_close(
        finish(denoiser, state), ordinary(pipeline, None, [3], **call), rtol=1e-4, atol=1e-4
    )


PICTURE = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
ON_PICTURE: dict[str, Any] = {
    "image": PICTURE,
    "strength": 0.8,
    "num_inference_steps": 6,
    "guidance_scale": 5.0,
}


def test_image_to_image_equals_the_ordinary_pipeline(pipeline: Any, denoiser: Denoiser) -> None:
    other = AutoPipelineForImage2Image.from_pipe(pipeline)
    expected = other("x", generator=generators([1]), output_type="latent", **ON_PICTURE).images
    state = denoiser.prepare(prompt="x", seeds=[1], **SIZE, **ON_PICTURE)
    torch.testing.assert_close(finish(denoiser, state), expected, rtol=1e-4, atol=1e-4)


def test_inpainting_keeps_what_the_mask_leaves_also_through_bytes(pipeline: Any, denoiser: Denoiser) -> None:
    """The modular blocks draw the picture's and the noise's randomness in another order than the ordinary
    pipeline does, so that only the kept part can be compared with it."""
    mask = Image.new("L", (96, 64), 0)
    mask.paste(255, (0, 0, 48, 64))
    other = AutoPipelineForInpainting.from_pipe(pipeline)
    expected = other(
        "x", mask_image=mask, generator=generators([1]), output_type="latent", **SIZE, **ON_PICTURE
    ).images
    state = denoiser.prepare(prompt="x", seeds=[1], mask_image=mask, **SIZE, **ON_PICTURE)
    denoiser.step(state)
    carried = DenoiseState.from_bytes(state.to_bytes())
    latents = finish(denoiser, state)
    assert torch.equal(finish(denoiser, carried), latents)
    torch.testing.assert_close(latents[..., 6:], expected[..., 6:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(latents[..., :6], state.values["image_latents"][..., :6], atol=0.1)


def test_an_image_does_not_depend_on_its_batch(denoiser: Denoiser) -> None:
    together = denoiser.prepare(prompt="a lake", seeds=[1, 2, 3], num_inference_steps=3, **SIZE)
    alone = denoiser.prepare(prompt="a lake", seeds=[2], num_inference_steps=3, **SIZE)
    torch.testing.assert_close(finish(denoiser, together)[1:2], finish(denoiser, alone), rtol=1e-4, atol=1e-4)


def test_states_take_turns_on_one_denoiser(denoiser: Denoiser) -> None:
    def fresh(prompt: str, scale: float) -> DenoiseState:
        return denoiser.prepare(prompt=prompt, seeds=[1], num_inference_steps=3, guidance_scale=scale, **SIZE)

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
    expected = finish(denoiser, denoiser.prepare(prompt="x", seeds=[1], **options, **SIZE))
    state = denoiser.prepare(prompt="x", seeds=[1], **options, **SIZE)
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
    state = denoiser.prepare(prompt="x", seeds=[1, 2], num_inference_steps=2, height=192, width=256)
    denoiser.step(state)
    assert max(denoiser.preview(state).size) == 128
    denoiser.step(state)
    assert [image.size for image in denoiser.decode(state)] == [(256, 192)] * 2
    with pytest.raises(ValueError, match="all 2 steps are done"):
        denoiser.step(state)


def test_broken_bytes_are_refused(denoiser: Denoiser) -> None:
    blob = denoiser.prepare(prompt="x", seeds=[1], num_inference_steps=2, **SIZE).to_bytes()
    foreign = blob.replace(b"EulerDiscreteScheduler", b"EulerDiscreteSchedulex")
    newer = blob.replace(b'version\\": 1', b'version\\": 9')
    assert foreign != blob != newer
    for broken in (b"", b"nonsense", blob[:-10], blob[: len(blob) // 2], foreign, newer):
        with pytest.raises(InvalidRequest):
            DenoiseState.from_bytes(broken)


@pytest.mark.parametrize(
    ("call", "param"),
    [
        ({"seeds": []}, "seed"),
        ({"scheduler": "magic"}, "scheduler"),
        ({"mask_image": Image.new("L", (96, 64))}, "image"),
        ({"strength": 0.0}, "strength"),
        ({"image": Image.new("RGB", (96, 64)), "strength": 0.1, "num_inference_steps": 2}, "strength"),
    ],
)
def test_bad_input_names_its_field(denoiser: Denoiser, call: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        denoiser.prepare(**{"prompt": "x", "seeds": [1], **SIZE, **call})
    assert error.value.param == param


def test_other_pipelines_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="Stable Diffusion XL"):
        Denoiser(tiny_sd15())
