"""Pipelines of flow matching step by step: their own numbers, in gangs and in a host too."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AutoencoderTiny,
    ChromaInpaintPipeline,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    ErnieImagePipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    Flux2KleinInpaintPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    HunyuanImagePipeline,
    Krea2Pipeline,
    LongCatImageEditPipeline,
    LongCatImagePipeline,
    ModularPipeline,
    QwenImage21Pipeline,
    QwenImageEditInpaintPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImagePipeline,
    StableDiffusion3PAGPipeline,
    UniPCMultistepScheduler,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImagePipeline,
)
from PIL import Image

from deployments.models import sizes_of, terms_of
from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.denoise import Denoiser, DenoiseState
from distriray.denoise.pipelines.registry import PIPELINES, family_of
from distriray.errors import GangBroken, GenerationCancelled, InvalidRequest, NotFinite, UnsupportedModel
from distriray.gang.admission import admit
from distriray.gang.config import HostConfig
from distriray.gang.messages import SegmentEnd
from distriray.limits import Limits
from distriray.models import ModelSpec, load_pipeline
from distriray.parallel import engine_of
from distriray.parallel.schedules import Schedules, Turn
from distriray.picture import Picture
from distriray.references import LOOKED_AT, Editing, Reference
from distriray.requests import GenerationRequest, SamplingParams
from tests.edits import FILLED, SHOWN, TO_FILL, shown, shrink, sized
from tests.guiding import guiders_with
from tests.models import (
    TEXT_WIDTH,
    save,
    tiny_chroma,
    tiny_ernie_image,
    tiny_ernie_image_transformer,
    tiny_flux,
    tiny_flux2,
    tiny_flux2_klein,
    tiny_flux2_klein_distilled,
    tiny_flux3,
    tiny_flux3_distilled,
    tiny_flux3_transformer,
    tiny_flux_fill,
    tiny_flux_schnell,
    tiny_hunyuan_image,
    tiny_hunyuan_image_distilled,
    tiny_kontext,
    tiny_krea2,
    tiny_krea2_distilled,
    tiny_longcat_image,
    tiny_longcat_image_edit,
    tiny_ovis_image,
    tiny_qwen_image,
    tiny_qwen_image21,
    tiny_qwen_image_edit,
    tiny_qwen_image_edit_plus,
    tiny_sd3,
    tiny_sdxl,
    tiny_z_image,
)
from tests.unit.deployments.test_pool_state import FACTS
from tests.unit.gang.runners import Gang
from tests.unit.test_denoise import (
    MASK,
    OF_AN_IMAGE,
    OF_THE_NETWORK,
    OTHERS,
    PICTURE,
    SIZE,
    failing_at_the_end,
    finish,
    finish_through_bytes,
    generators,
    refuses,
)
from tests.unit.test_denoise import begin as begin_as_asked

MODELS: dict[str, Callable[[], Any]] = {
    "sd3": tiny_sd3,
    "flux-dev": tiny_flux,
    "flux-schnell": tiny_flux_schnell,
    "flux-fill": tiny_flux_fill,
    "flux-kontext": tiny_kontext,
    "chroma": tiny_chroma,
    "ernie-image": tiny_ernie_image,
    "flux2-dev": tiny_flux2,
    "flux2-klein": tiny_flux2_klein,
    "flux2-klein-distilled": tiny_flux2_klein_distilled,
    "flux3": tiny_flux3,
    "flux3-distilled": tiny_flux3_distilled,
    "hunyuan-image": tiny_hunyuan_image,
    "hunyuan-image-distilled": tiny_hunyuan_image_distilled,
    "krea2": tiny_krea2,
    "krea2-distilled": tiny_krea2_distilled,
    "longcat-image": tiny_longcat_image,
    "longcat-image-edit": tiny_longcat_image_edit,
    "ovis-image": tiny_ovis_image,
    "qwen-image": tiny_qwen_image,
    "qwen-image-2.1": tiny_qwen_image21,
    "qwen-image-edit": tiny_qwen_image_edit,
    "qwen-image-edit-plus": tiny_qwen_image_edit_plus,
    "z-image": tiny_z_image,
}
BRANCHES_APART = [
    "chroma",
    "flux2-klein",
    "flux3",
    "hunyuan-image",
    "krea2",
    "longcat-image",
    "longcat-image-edit",
    "ovis-image",
    "qwen-image",
    "qwen-image-2.1",
    "qwen-image-edit",
    "qwen-image-edit-plus",
]
"""Those whose guidance branches have a call each."""
SMALL: dict[str, Any] = {"prompt": "a lake", "num_inference_steps": 3, **SIZE}
BY_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
LIKENESS = 1e-5
"""Of the largest value: what other sums of the same numbers may differ by."""


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def pipeline(model: str) -> Any:
    return MODELS[model]()


@pytest.fixture(scope="module")
def denoiser(pipeline: Any) -> Denoiser:
    return Denoiser(pipeline)


def begin(denoiser: Denoiser, seeds: list[int], **fields: Any) -> DenoiseState:
    """Those fields prepared, with consecutive seeds, and with the pictures that the model needs."""
    return begin_as_asked(denoiser, seeds, **shown(denoiser, **fields))


def plain(
    pipeline: Any, seeds: list[int], scheduler: Any = None, output_type: str = "latent", **call: Any
) -> Any:
    """What diffusers' own pipeline gives for the same call: unpacked latents, or pictures."""
    by_flux = isinstance(pipeline, FluxPipeline | FluxImg2ImgPipeline | FluxInpaintPipeline)
    if by_flux and not pipeline.transformer.config.guidance_embeds:
        call["max_sequence_length"] = 256  # what the makers of FLUX.1-schnell say
    if isinstance(pipeline, ChromaInpaintPipeline):
        call["max_sequence_length"] = 512  # as for its other tasks
    if isinstance(pipeline, FluxFillPipeline):
        call = {"image": TO_FILL, "mask_image": FILLED, **call}
    for name in ("image", "mask_image") if "mask_image" in call else ():
        call[name] = [call[name]] * len(seeds)  # or one is encoded for all, with the first one's generator
    if isinstance(pipeline, FluxKontextPipeline):
        call["max_area"] = call["height"] * call["width"]  # or it draws a megapixel, whatever it is asked
    edits = isinstance(
        pipeline, QwenImageEditPipeline | QwenImageEditPlusPipeline | QwenImageEditInpaintPipeline
    )
    if edits:
        call.setdefault("image", SHOWN)
    if edits or isinstance(pipeline, QwenImagePipeline | QwenImageImg2ImgPipeline | QwenImageInpaintPipeline):
        call["true_cfg_scale"] = call.pop("guidance_scale", 4.0)
        call.setdefault("negative_prompt", " ")  # what the makers of Qwen-Image say
    if isinstance(pipeline, QwenImage21Pipeline):
        call["true_cfg_scale"] = call.pop("guidance_scale", 1.0)
        call.setdefault("negative_prompt", " ")
    if isinstance(pipeline, ZImagePipeline | ZImageImg2ImgPipeline | ZImageInpaintPipeline):
        call.setdefault("guidance_scale", 0.0)  # what the makers of Z-Image-Turbo say
    if isinstance(pipeline, LongCatImagePipeline):
        call["enable_prompt_rewrite"] = False
    if isinstance(pipeline, LongCatImageEditPipeline):
        call.setdefault("image", SHOWN)
    if isinstance(pipeline, Krea2Pipeline) and pipeline.config.is_distilled:
        call.setdefault("guidance_scale", 0.0)  # what the makers of Krea 2 say
    guiding: AbstractContextManager[None] = nullcontext()
    if isinstance(pipeline, HunyuanImagePipeline):
        if pipeline.guider is None:
            call["distilled_guidance_scale"] = call.pop("guidance_scale", 3.25)
        else:
            guidance = {name: call.pop(name) for name in list(call) if name.startswith("guidance_")}
            guiding = guiders_with(pipeline, **guidance)
    tokens: dict[str, torch.Tensor] = {}
    by_flux2 = isinstance(pipeline, Flux2Pipeline | Flux2KleinPipeline | Flux2KleinInpaintPipeline)
    if by_flux2:  # klein gives latents out as its VAE takes them
        call["callback_on_step_end"] = lambda _pipeline, _step, _timestep, values: tokens.update(values) or {}
    before = pipeline.scheduler
    pipeline.scheduler = scheduler or before
    modular = isinstance(pipeline, ModularPipeline)
    try:
        own = by_guider(pipeline, **call) if modular else call
        with guiding, sized(pipeline, own) as given:
            result = pipeline(
                prompt="a lake",
                num_images_per_prompt=len(seeds),
                generator=generators(seeds),
                output_type="pt" if modular and output_type == "latent" else output_type,
                **given,
            )
        images = result.latents if modular and output_type == "latent" else result.images
    finally:
        pipeline.scheduler = before
    if output_type == "latent" and by_flux2:
        return tokens["latents"].transpose(1, 2).unflatten(2, (call["height"] // 16, call["width"] // 16))
    if output_type == "latent" and hasattr(pipeline, "_unpack_latents"):
        scale = [] if isinstance(pipeline, Krea2Pipeline) else [pipeline.vae_scale_factor]
        latents = pipeline._unpack_latents(images, call["height"], call["width"], *scale)
        return latents.squeeze(2) if latents.ndim == 5 else latents
    return images


def by_guider(pipeline: ModularPipeline, **call: Any) -> dict[str, Any]:
    """A call without what is said of guidance, which is told the guider, if the pipeline has one."""
    guider = pipeline.components.get("guider")
    scale, rescale = call.pop("guidance_scale", 3.5), call.pop("guidance_rescale", 0.0)
    if guider is not None:
        pipeline.update_components(guider=guider.new(guidance_scale=scale, guidance_rescale=rescale))
    return call


def skip_unless_it_begins_from_pictures(pipeline: Any) -> None:
    if "image-to-image" not in PIPELINES[family_of(pipeline)].tasks:
        pytest.skip("the family has one pipeline, for other tasks")


def on_pictures(pipeline: Any, task: str) -> Any:
    """diffusers' pipeline for that task around the same models."""
    skip_unless_it_begins_from_pictures(pipeline)
    family = PIPELINES[family_of(pipeline)]
    other = family.steps.kinds[family.tasks.index(task)].from_pipe(pipeline)
    if isinstance(other, ChromaInpaintPipeline):  # which asks for what no network of Chroma has
        other.transformer.register_to_config(guidance_embeds=False)
    other.set_progress_bar_config(disable=True)
    return other


def skip_unless_taken(denoiser: Denoiser, scheduler: str | None) -> None:
    if scheduler is not None and scheduler not in denoiser.terms.schedulers:
        pytest.skip("not one of the family's")


def differs(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, of the largest value."""
    return float((one - other).abs().max() / other.abs().max())


def apart(picture: Image.Image, other: Image.Image) -> int:
    """The largest difference of two pictures, of 255."""
    return int(np.abs(np.array(picture, int) - np.array(other, int)).max())


def named(name: str | None, pipeline: Any) -> Any:
    """A scheduler for a model, made anew by diffusers' names."""
    if name is None:
        return None
    config = pipeline.scheduler.config
    kinds = {
        "dpmpp-2m": (DPMSolverMultistepScheduler, {**BY_FLOW, "flow_shift": config["shift"]}),
        "euler": (FlowMatchEulerDiscreteScheduler, {}),
        "heun": (FlowMatchHeunDiscreteScheduler, {}),
        "unipc": (UniPCMultistepScheduler, {**BY_FLOW, "flow_shift": config["shift"]}),
    }
    kind, options = kinds[name]
    return kind.from_config(config, **options)


@pytest.mark.parametrize("scheduler", [None, "dpmpp-2m", "euler", "heun", "unipc"])
def test_steps_by_hand_are_the_ordinary_pipelines_bit_for_bit_also_through_bytes(
    pipeline: Any, denoiser: Denoiser, scheduler: str | None
) -> None:
    skip_unless_taken(denoiser, scheduler)
    by_size = pipeline.scheduler.config.use_dynamic_shifting
    if scheduler == "dpmpp-2m" and hasattr(pipeline, "_unpack_latents") and not by_size:
        pytest.skip("diffusers' FluxPipeline always shifts this one by the size, which it refuses")
    call = {"num_inference_steps": 5, **SIZE}
    expected = plain(pipeline, [1, 2], named(scheduler, pipeline), **call)
    state = begin(denoiser, [1, 2], prompt="a lake", scheduler=scheduler, **call)
    carried = finish_through_bytes(denoiser, state)
    assert torch.equal(finish(denoiser, state), expected)
    assert torch.equal(carried, expected)


OLD = Image.radial_gradient("L").resize((128, 80)).convert("RGB")
NEW = PICTURE.resize((72, 96))
EDITED: dict[str, list[Image.Image]] = {
    "flux-kontext": [OLD],
    "flux2-dev": [OLD, NEW],
    "flux2-klein": [OLD],
    "flux2-klein-distilled": [NEW, OLD, NEW],
    "flux3": [OLD, NEW],
    "flux3-distilled": [NEW],
    "longcat-image-edit": [OLD],
    "qwen-image-2.1": [OLD, NEW],
    "qwen-image-edit": [OLD],
    "qwen-image-edit-plus": [NEW, OLD, NEW],
}
"""What each model that edits is shown."""


@pytest.fixture(autouse=True)
def small_megapixels(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


def editing_of(denoiser: Denoiser) -> Editing:
    assert denoiser.terms.editing is not None
    return denoiser.terms.editing


def as_taken(denoiser: Denoiser, pictures: list[Image.Image]) -> Any:
    """Pictures to edit as the ordinary pipeline takes them."""
    return pictures if editing_of(denoiser).max_references > 1 else pictures[0]


def references(pictures: list[Image.Image]) -> tuple[Reference, ...]:
    return tuple(Reference(image=Picture.of(picture)) for picture in pictures)


@pytest.mark.parametrize("edits", EDITED)
def test_what_is_edited_is_the_ordinary_pipelines_bit_for_bit_also_through_bytes(edits: str) -> None:
    pipeline, pictures, call = MODELS[edits](), EDITED[edits], {"num_inference_steps": 3, **SIZE}
    denoiser = Denoiser(pipeline)
    image = as_taken(denoiser, pictures)
    expected = plain(pipeline, [1, 2], image=image, **call)
    state = begin(denoiser, [1, 2], prompt="a lake", references=references(pictures), **call)
    carried = finish_through_bytes(denoiser, state)
    assert torch.equal(finish(denoiser, state), expected)
    assert torch.equal(carried, expected)
    first, *others = pictures
    by_image = begin(denoiser, [1, 2], prompt="a lake", image=first, references=references(others), **call)
    assert torch.equal(finish(denoiser, by_image), expected), "an image is the first of what is edited"
    assert denoiser.decode(by_image) == plain(pipeline, [1, 2], image=image, output_type="pil", **call)
    denoiser.preview(by_image)


@pytest.mark.parametrize("edits", EDITED)
def test_a_gang_in_sync_edits_as_one_device_does_also_if_it_changes_in_the_middle(edits: str) -> None:
    pipeline, pictures, call = MODELS[edits](), EDITED[edits], {**TALL, "num_inference_steps": 4}
    image = as_taken(Denoiser(pipeline), pictures)
    (picture,) = plain(pipeline, [1], image=image, output_type="pil", **call)
    gangs = Gangs(MODELS[edits], **SYNC)
    for sizes in ((2,), (3,), (2, 4, 1, 2)):
        for drawn in gangs.draw(sizes, **call, references=references(pictures)):
            assert apart(drawn.picture, picture) <= 1, sizes


def test_a_host_predicts_what_it_edits_by_the_pixels_that_the_model_is_shown() -> None:
    denoiser = Denoiser(tiny_flux2())
    facts = replace(FACTS, terms=denoiser.terms, size_unit=denoiser.sizes.unit, default_size=(1024, 1024))
    pictures = {"image": Image.new("RGB", (2048, 1024)), "references": references([OLD])}
    asked = GenerationRequest(prompt="x", height=512, width=512, **pictures)
    admitted = admit(asked, HostConfig(), facts)
    ((name, added),) = admitted.view(0.0, None).besides
    assert added == pytest.approx((1448 * 720 + 128 * 80) / 512**2, rel=0.2)
    others = [Image.new("RGB", (side, 1024)) for side in (1000, 1024, 1100, 2000, 3000, 4096)]
    views = [
        admit(asked.model_copy(update={"image": Picture.of(image)}), HostConfig(), facts) for image in others
    ]
    assert {view.view(0.0, None).besides for view in views} == {((name, added),)}, "one case to learn from"
    assert list(admitted.request.pictures) == ["references.0.image", "references.1.image"]
    plain = admit(asked.model_copy(update={"image": None, "references": ()}), HostConfig(), facts)
    assert plain.view(0.0, None).besides == ()


@pytest.mark.parametrize("edits", EDITED)
def test_the_pixels_that_a_model_is_shown_are_those_of_its_tokens(
    edits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # of `small_megapixels`
    denoiser = Denoiser(MODELS[edits]())
    if editing_of(denoiser).keeps:
        pytest.skip("the next test is about it")
    params = SamplingParams(prompt="x", seed=1, height=64, width=64, image=Image.new("RGB", (128, 96)))
    state = denoiser.prepare(params)
    tokens = state.values.get("references", state.values.get("image_cond_hidden_states"))
    settled = denoiser.terms.settle(params, denoiser.sizes.default, denoiser.sizes.unit)
    pixels = editing_of(denoiser).shown_pixels(settled.references, denoiser.sizes.unit, 64 * 64)
    assert tokens is not None and pixels == pytest.approx(tokens.shape[1] * denoiser.sizes.unit**2, rel=0.02)


def test_pictures_that_are_only_looked_at_cost_a_step_little_and_a_gang_no_exchange() -> None:
    kept = editing_of(Denoiser(tiny_qwen_image21()))
    assert kept.keeps and kept.most_exchanged_pixels(3) == 0
    assert kept.shown_pixels(references([OLD, NEW]), 32, 64 * 64) == pytest.approx(
        2 * 2**20 * LOOKED_AT, rel=0.05
    )


def test_of_limits_that_allow_few_references_the_most_pixels_may_be_those_of_a_sole_one() -> None:
    sole = editing_of(Denoiser(tiny_flux3()))
    assert [sole.most_exchanged_pixels(count) / 2**20 for count in (0, 1, 4, 6, 12)] == [0, 4, 4, 6, 10]
    many = editing_of(Denoiser(tiny_flux2()))
    assert [many.most_exchanged_pixels(count) / 2**20 for count in (0, 1, 4, 12)] == [0, 1, 4, 10]


def test_that_a_size_beyond_the_limits_is_the_first_pictures_is_said() -> None:
    denoiser = Denoiser(tiny_flux2())
    facts = replace(FACTS, terms=denoiser.terms, size_unit=denoiser.sizes.unit)
    asked = GenerationRequest(prompt="x", image=Image.new("RGB", (500, 333)))
    config, says = HostConfig(limits=Limits(max_side=256)), "320 is above the limit of 256"
    with pytest.raises(
        InvalidRequest, match=f"{says}; where none is named it goes by the first picture, name a size"
    ):
        admit(asked, config, facts)
    with pytest.raises(InvalidRequest, match=f"{says}$"):
        admit(asked.model_copy(update={"height": 320, "width": 256}), config, facts)
    assert admit(asked.model_copy(update={"height": 256, "width": 256}), config, facts).request.width == 256


def test_pictures_are_refused_by_the_names_that_they_were_sent_with() -> None:
    denoiser = Denoiser(tiny_flux2())
    facts = replace(FACTS, terms=denoiser.terms, size_unit=denoiser.sizes.unit)
    large, narrow, small = (Image.new("RGB", size) for size in ((500, 500), (64, 640), (64, 64)))
    config = HostConfig(limits=Limits(max_image_pixels=499 * 500))
    for picture in (large, narrow):
        for name, fields in (
            ("image", {"image": picture, "references": references([small])}),
            ("references.0.image", {"image": small, "references": references([picture])}),
        ):
            with pytest.raises(InvalidRequest, match=f"^{name} ") as refused:
                admit(GenerationRequest(prompt="x", **fields), config, facts)
            assert refused.value.param == name


OF_16 = {(320, 208): (1264, 832), (327, 215): (1264, 832), (3000, 1500): (1456, 720)}
OF_16_UP = {(320, 208): (1280, 832), (327, 215): (1264, 832), (3000, 1500): (1456, 736)}
OF_32 = {(320, 208): (1280, 832), (327, 215): (1248, 832), (3000, 1500): (1440, 736)}
MEGAPIXEL = {
    "flux-kontext": OF_16,
    "longcat-image-edit": OF_16_UP,
    "qwen-image-2.1": OF_32,
    "qwen-image-edit": OF_32,
    "qwen-image-edit-plus": OF_32,
}
"""What is drawn by those who see a megapixel of whatever they edit, in their multiples of pixels."""


@pytest.mark.parametrize("edits", EDITED)
@pytest.mark.parametrize(
    ("size", "drawn"),
    [((320, 208), (320, 208)), ((327, 215), (320, 208)), ((3000, 1500), (1440, 720))],
)
def test_a_picture_is_by_default_of_the_size_of_what_is_edited_up_to_a_megapixel(
    edits: str, size: tuple[int, int], drawn: tuple[int, int]
) -> None:
    terms, unit = Denoiser(MODELS[edits]()).terms, 16
    if edits in MEGAPIXEL:
        drawn = MEGAPIXEL[edits][size]
    asked = SamplingParams(prompt="x", image=Image.new("RGB", size))
    settled = terms.settle(asked, (1024, 1024), unit)
    assert (settled.width, settled.height) == drawn and settled.image is None
    assert terms.settle(settled, (1024, 1024), unit) == settled, "settled once, it stays"
    named = terms.settle(asked.model_copy(update={"width": 512, "height": 256}), (1024, 1024), unit)
    assert (named.width, named.height) == (512, 256)
    if not editing_of(Denoiser(MODELS[edits]())).needs_references:
        without = terms.settle(SamplingParams(prompt="x"), (1024, 1024), unit)
        assert (without.width, without.height) == (1024, 1024)


@pytest.mark.parametrize(
    ("call", "param", "says"),
    [
        (
            {"image": Image.new("RGB", (63, 64))},
            "image",
            "image is 63x64 pixels; what is edited has sides of 64",
        ),
        (
            {"references": references([OLD.resize((640, 64))])},
            "references.0.image",
            "the longer at most 8 times",
        ),
        ({"references": references([OLD] * 11)}, "references", "are 11 pictures; this .* at most (1|3|10)"),
        ({"image": OLD, "references": references([OLD] * 10)}, "references", "references and image are 11"),
        ({"image": OLD, "strength": 0.5}, "strength", "this model edits: it begins from noise"),
    ],
)
@pytest.mark.parametrize("edits", EDITED)
def test_what_cannot_be_edited_is_refused_by_name(
    edits: str, call: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says) as error:
        begin(Denoiser(MODELS[edits]()), [1], **{**SMALL, **call})
    assert error.value.param == param


@pytest.mark.parametrize("scheduler", ["euler", "heun", None])
def test_image_to_image_is_the_ordinary_pipelines_bit_for_bit(
    pipeline: Any, denoiser: Denoiser, scheduler: str | None
) -> None:
    skip_unless_taken(denoiser, scheduler)
    other = on_pictures(pipeline, "image-to-image")
    call = {"image": PICTURE, "strength": 0.7, "num_inference_steps": 6, **SIZE}
    call["guidance_scale"] = denoiser.terms.guidance_scale  # as for text to image, where diffusers has two
    pictures = {"image": [PICTURE] * 2}
    expected = plain(other, [1, 2], named(scheduler, pipeline), **{**call, **pictures})
    state = begin(denoiser, [1, 2], prompt="a lake", scheduler=scheduler, **call)
    assert state.num_steps == (9 if scheduler == "heun" else 5)
    assert torch.equal(finish(denoiser, state), expected)


@pytest.mark.parametrize(
    ("strength", "scheduler", "guided", "seeds"),
    [
        (1.0, None, True, [1, 2]),
        (0.7, None, False, [1]),
        (0.7, "euler", True, [1, 2]),
        (1.0, "heun", False, [1]),
        (0.7, "heun", True, [1, 2]),
    ],
)
def test_inpainting_is_the_ordinary_pipelines_bit_for_bit_also_through_bytes(
    pipeline: Any,
    denoiser: Denoiser,
    strength: float,
    scheduler: str | None,
    guided: bool,
    seeds: list[int],
) -> None:
    skip_unless_taken(denoiser, scheduler)
    other = pipeline if denoiser.terms.needs_mask else on_pictures(pipeline, "inpainting")
    terms = denoiser.terms
    scale = (
        max(terms.guidance_scale, 3.0) if guided and "guidance_scale" not in terms.lacks else terms.unguided
    )
    call = {"image": PICTURE, "mask_image": MASK, "strength": strength, "num_inference_steps": 6, **SIZE}
    call["guidance_scale"] = scale
    expected = plain(other, seeds, named(scheduler, pipeline), **call)
    state = begin(denoiser, seeds, prompt="a lake", scheduler=scheduler, **call)
    assert state.task == "inpainting"
    carried = finish_through_bytes(denoiser, state)
    assert torch.equal(finish(denoiser, state), expected)
    assert torch.equal(carried, expected)
    pictures = plain(other, seeds, named(scheduler, pipeline), "pil", **call)
    for drawn, picture in zip(denoiser.decode(state), pictures, strict=True):
        assert apart(drawn, picture) <= 1, "the VAE is given the same numbers, in another order in memory"


def test_a_request_that_names_nothing_gets_the_familys_steps_and_guidance(denoiser: Denoiser) -> None:
    """And is drawn with that guidance as the ordinary pipeline draws: as steps by hand are above."""
    state = begin(denoiser, [1], prompt="a lake", **SIZE)
    assert state.num_steps == denoiser.terms.num_inference_steps
    assert state.guidance_scale == denoiser.terms.guidance_scale


def test_in_half_precision_too_a_mask_is_filled_in_as_the_ordinary_pipeline_does(model: str) -> None:
    pipeline = MODELS[model]().to(torch.bfloat16)
    other, denoiser = on_pictures(pipeline, "inpainting"), Denoiser(pipeline)
    call = {"image": PICTURE, "mask_image": MASK, "strength": 0.7, "num_inference_steps": 3, **SIZE}
    call["guidance_scale"] = denoiser.terms.guidance_scale
    state = begin(denoiser, [1], prompt="a lake", **call)
    assert torch.equal(finish(denoiser, state), plain(other, [1], **call))


def test_in_half_precision_too_it_is_the_ordinary_pipelines_bit_for_bit(model: str) -> None:
    """As `auto` loads it on a GPU."""
    pipeline = MODELS[model]().to(torch.bfloat16)
    denoiser, call = Denoiser(pipeline), {"num_inference_steps": 3, **SIZE}
    state = DenoiseState.from_bytes(begin(denoiser, [1], prompt="a lake", **call).to_bytes())
    assert state.latents.dtype is (torch.float32 if model == "z-image" else torch.bfloat16)
    assert torch.equal(finish(denoiser, state), plain(pipeline, [1], **call))
    assert [denoiser.decode(state)[0]] == plain(pipeline, [1], output_type="pil", **call)
    denoiser.preview(state)


@pytest.mark.parametrize("call", [{}, {"image": PICTURE}, {"image": PICTURE, "mask_image": MASK}])
def test_an_image_does_not_depend_on_its_batch(denoiser: Denoiser, call: dict[str, Any]) -> None:
    if "image" in call:
        skip_unless_it_begins_from_pictures(denoiser._pipeline)
    call = {**SMALL, **call}
    together, alone = begin(denoiser, [1, 2, 3], **call), begin(denoiser, [2], **call)
    torch.testing.assert_close(finish(denoiser, together)[1:2], finish(denoiser, alone), rtol=1e-4, atol=1e-4)


def test_a_sampler_that_draws_draws_from_the_requests_own_generators(
    monkeypatch: pytest.MonkeyPatch, pipeline: Any
) -> None:
    stochastic = FlowMatchEulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, stochastic_sampling=True
    )
    monkeypatch.setattr(pipeline, "scheduler", stochastic)
    denoiser = Denoiser(pipeline)
    together, alone = begin(denoiser, [1, 2], **SMALL), begin(denoiser, [2], **SMALL)
    denoiser.step(together)
    carried = DenoiseState.from_bytes(together.to_bytes())
    assert torch.equal(finish(denoiser, carried), finish(denoiser, together))
    torch.testing.assert_close(together.latents[1:], finish(denoiser, alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheduler", [None, "dpmpp-2m", "unipc"])
@pytest.mark.parametrize("part", ["transformer", "scheduler"])
def test_whatever_fails_the_state_stays(denoiser: Denoiser, scheduler: str | None, part: str) -> None:
    skip_unless_taken(denoiser, scheduler)
    state = begin(denoiser, [1], **SMALL, scheduler=scheduler)
    while not state.done:
        owner = denoiser._pipeline.transformer if part == "transformer" else state.scheduler
        before = state.to_bytes()
        name = "forward" if part == "transformer" else "step"
        with failing_at_the_end(owner, name), pytest.raises(GangBroken):
            denoiser.step(state)
        assert state.to_bytes() == before
        denoiser.step(state)


def test_the_users_pipeline_keeps_its_scheduler(pipeline: Any) -> None:
    scheduler, before = pipeline.scheduler, dict(vars(pipeline.scheduler))
    denoiser = Denoiser(pipeline)
    finish(denoiser, begin(denoiser, [1], **SMALL, scheduler="euler"))
    assert pipeline.scheduler is scheduler and vars(scheduler) == before


@pytest.mark.parametrize("field", OF_THE_NETWORK)
def test_every_field_decides_the_picture_or_is_refused_by_name(denoiser: Denoiser, field: str) -> None:
    plain = {**shown(denoiser, **SMALL), "seed": 1, **OF_AN_IMAGE.get(field, {})}
    if field in ("negative_prompt", "guidance_end") and denoiser.guides:
        plain["guidance_scale"] = denoiser.terms.unguided + 2
    other = {**OTHERS, "height": 96, "width": 128, "scheduler": "unipc", "guidance_scale": 2.0}[field]
    if field == "scheduler" and len(denoiser.terms.schedulers) == 1:
        pytest.skip("there is one alone")
    if field == "strength":
        skip_unless_it_begins_from_pictures(denoiser._pipeline)
    if field in denoiser.terms.lacks:
        refuses(denoiser, plain, field)
        return
    replaced = {"image"} if field == "references" else set()  # some edit one picture alone
    kept = {name: value for name, value in plain.items() if name not in replaced}
    usual, changed = (
        finish(denoiser, denoiser.prepare(SamplingParams(**fields)))
        for fields in (plain, {**kept, field: other})
    )
    assert usual.shape != changed.shape or not torch.allclose(usual, changed, rtol=1e-3, atol=1e-3)


SECOND = {"prompt_2": "a hill", "negative_prompt_2": "fog"}
THIRD = {"prompt_3": "an island", "negative_prompt_3": "a boat"}
TEXTS: dict[str, tuple[Callable[[], Any], dict[str, str]]] = {
    "sdxl": (tiny_sdxl, SECOND),
    "sdxl, both negative": (tiny_sdxl, {"negative_prompt": "rain", **SECOND}),
    "sd3": (tiny_sd3, SECOND),
    "sd3 with T5": (partial(tiny_sd3, t5=True), {**SECOND, **THIRD}),
    "flux": (tiny_flux, {"prompt_2": "a hill"}),
}


def test_a_scale_that_would_guide_is_refused_where_nothing_does(denoiser: Denoiser) -> None:
    if "guidance_scale" not in denoiser.terms.lacks:
        pytest.skip("it has a scale")
    scale = denoiser.terms.unguided
    begin(denoiser, [1], **SMALL, guidance_scale=scale)
    with pytest.raises(InvalidRequest, match="^guidance_scale: .*; leave it out$"):
        begin(denoiser, [1], **SMALL, guidance_scale=scale + 0.5)


@pytest.mark.parametrize("model", TEXTS)
def test_encoders_with_prompts_of_their_own_read_them_as_the_pipelines_do(model: str) -> None:
    """But for SDXL's second negative prompt, which diffusers forgets where there is no first."""
    make, texts = TEXTS[model]
    pipeline = make()
    call = {**SMALL, "guidance_scale": 4.0}
    call.pop("prompt")
    first = {"negative_prompt": ""} if "negative_prompt_2" in texts else {}
    expected = plain(pipeline, [1], **call, **{**first, **texts})
    denoiser = Denoiser(pipeline)
    state = begin(denoiser, [1], prompt="a lake", **call, **texts)
    assert state.warnings == ()
    torch.testing.assert_close(finish(denoiser, state), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", ["sd3", "flux", "sdxl"])
def test_each_text_that_is_cut_is_named_and_none_that_another_encoder_reads_whole(model: str) -> None:
    make, _ = TEXTS[model]
    denoiser = Denoiser(make())
    long = "x" * 90  # a token a letter
    params = {**SMALL, "seed": 1, "prompt": "a lake"}

    def said(**texts: str) -> list[str]:
        state = denoiser.prepare(SamplingParams(**{**params, **texts}))
        return [warning.split(" tokens, and")[0] for warning in state.warnings]

    by_t5 = model == "flux"  # which takes more than CLIP
    assert said(prompt=long) == ([] if by_t5 else ["prompt has 90"])
    assert said(prompt=long, prompt_2="a hill") == ["prompt has 90"]
    assert said(prompt_2=long) == ([] if by_t5 else ["prompt_2 has 90"])


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_what_sdxl_is_told_of_the_photograph_is_the_pipelines(scale: float) -> None:
    pipeline = tiny_sdxl()
    call = {**SMALL, "guidance_scale": scale}
    call.pop("prompt")
    told = {"original_size": "640x480", "target_size": "320x200", "crops_coords_top_left": "300,20"}
    theirs = {"original_size": (480, 640), "target_size": (200, 320), "crops_coords_top_left": (20, 300)}
    expected = plain(pipeline, [1], **call, **theirs)
    denoiser = Denoiser(pipeline)
    state = begin(denoiser, [1], prompt="a lake", **call, **told)
    torch.testing.assert_close(finish(denoiser, state), expected, rtol=1e-4, atol=1e-4)


def test_pictures_and_previews(pipeline: Any, denoiser: Denoiser) -> None:
    call = {"height": 192, "width": 256, "num_inference_steps": 2}
    state = begin(denoiser, [1, 2], prompt="a lake", **call)
    denoiser.step(state)
    assert denoiser.preview(state).size == (64, 48)
    finish(denoiser, state)
    assert denoiser.decode(state) == plain(pipeline, [1, 2], output_type="pil", **call)


@pytest.mark.parametrize("scheduler", [None, "dpmpp-2m", "heun", "unipc"])
def test_estimates_are_of_the_picture_and_the_last_one_is_it(
    denoiser: Denoiser, scheduler: str | None
) -> None:
    skip_unless_taken(denoiser, scheduler)
    state = begin(denoiser, [1], **{**SMALL, "scheduler": scheduler})
    noise = state.latents
    denoiser.step(state)
    output = state.network_output
    assert output is not None and state.estimate is not None
    # All noise at first, or nearly: the latents are the noise, and the output is noise less picture.
    torch.testing.assert_close(state.estimate, noise - output.output, rtol=2e-2, atol=2e-2)
    latents = finish(denoiser, state)
    torch.testing.assert_close(state.estimate, latents, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("scheduler", ["euler", "heun"])
def test_a_request_knows_how_many_steps_are_done_on_its_image(denoiser: Denoiser, scheduler: Any) -> None:
    skip_unless_taken(denoiser, scheduler)
    skip_unless_it_begins_from_pictures(denoiser._pipeline)
    for steps, strength in ((2, 0.5), (7, 0.3), (10, 0.3), (100, 0.29), (30, 1.0)):
        on_picture = {"image": PICTURE, "strength": strength, "num_inference_steps": steps}
        params = SamplingParams(prompt="x", seed=1, scheduler=scheduler, **on_picture)
        known = params.num_steps(denoiser.own_steps, rounds_up=denoiser.terms.rounds_up)
        assert denoiser.prepare(params).num_steps == known


@pytest.mark.parametrize("steps", [1, 2, 1000])
@pytest.mark.parametrize("scheduler", ["dpmpp-2m", "euler", "heun", "unipc"])
def test_any_number_of_steps_can_be_stepped_and_is_what_the_request_says(
    denoiser: Denoiser, scheduler: Any, steps: int
) -> None:
    skip_unless_taken(denoiser, scheduler)
    small = shown(denoiser, prompt="x", seed=1, height=32, width=32)
    params = SamplingParams(**small, scheduler=scheduler, num_inference_steps=steps)
    if steps == 1 and denoiser._pipeline.scheduler.config.get("shift_terminal"):
        with pytest.raises(InvalidRequest, match=r"steps 1 is too few .* at 0.02 of all noise") as error:
            denoiser.prepare(params)
        assert error.value.param == "num_inference_steps"
        return
    state = denoiser.prepare(params)
    settled = denoiser.terms.settle(params, denoiser.sizes.default, denoiser.sizes.unit)
    assert settled.num_steps(denoiser.own_steps) == state.num_steps
    denoiser.step(state)
    assert state.latents.isfinite().all() and state.estimate is not None
    assert state.scheduler.step_index == 1, "though the first timesteps are one when they are rounded"


@pytest.mark.parametrize(
    ("call", "param", "says"),
    [
        ({"height": 72}, "height", "height 72 is not a multiple of (16; use 64 or 80|32; use 64 or 96)"),
        ({"scheduler": "ddim"}, "scheduler", r"scheduler ddim is not for this model; use .*euler"),
        ({"scheduler": "lcm"}, "scheduler", "scheduler lcm is not for this model"),
        (
            {"image": PICTURE, "mask_image": MASK, "scheduler": "unipc"},
            "scheduler",
            "unipc (cannot begin from an im|is not for)",
        ),
        ({"image": PICTURE, "scheduler": "unipc"}, "scheduler", "unipc (cannot begin from an im|is not for)"),
        ({"image": PICTURE, "strength": 1e-20}, "strength", "leaves none to do"),
        ({"seed": None}, "seed", "there is no seed yet"),
    ],
)
def test_bad_input_names_its_field(denoiser: Denoiser, call: dict[str, Any], param: str, says: str) -> None:
    if "image" in call and param != "mask_image":
        skip_unless_it_begins_from_pictures(denoiser._pipeline)
    with pytest.raises(InvalidRequest, match=says) as error:
        begin(denoiser, [1], **{**SMALL, **call})
    assert error.value.param == param


def test_a_model_with_a_scheduler_of_the_other_kind_or_of_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, pipeline: Any
) -> None:
    for kind, says in (
        (EulerDiscreteScheduler, "EulerDiscreteScheduler follows noise, and .* denoises by flow matching"),
        (FlowMatchLCMScheduler, "own scheduler FlowMatchLCMScheduler cannot be part of a state"),
    ):
        monkeypatch.setattr(pipeline, "scheduler", kind.from_config(pipeline.scheduler.config))
        with pytest.raises(UnsupportedModel, match=says):
            Denoiser(pipeline)
    sdxl = tiny_sdxl()
    sdxl.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UnsupportedModel, match="follows flow matching, and .* denoises by noise"):
        Denoiser(sdxl)


@pytest.mark.parametrize("model", ["sd3", "flux-dev"])
def test_models_that_cannot_be_drawn_from_are_refused_by_name(model: str) -> None:
    textless, wide, shiftless, other = (MODELS[model]() for _ in range(4))
    textless.register_modules(text_encoder_2=None)
    with pytest.raises(UnsupportedModel, match="without text_encoder_2 cannot"):
        Denoiser(textless)
    wide.vae.register_to_config(latent_channels=8)
    channels = wide.transformer.config.in_channels
    with pytest.raises(UnsupportedModel, match=f"a transformer of {channels} channels; with latents of 8"):
        Denoiser(wide)
    shiftless.vae.register_to_config(shift_factor=None)
    with pytest.raises(UnsupportedModel, match="no shift_factor"):
        Denoiser(shiftless)
    other.register_modules(vae=AutoencoderTiny())
    with pytest.raises(UnsupportedModel, match="with AutoencoderTiny; known is AutoencoderKL"):
        Denoiser(other)


def test_the_edge_knows_what_a_model_lacks_and_what_it_draws_by_default(denoiser: Denoiser) -> None:
    """A router and a host refuse before a worker has heard of the request."""
    facts = replace(FACTS, terms=denoiser.terms, size_unit=denoiser.sizes.unit)
    asked = shown(denoiser, prompt="a lake")
    request = admit(GenerationRequest(**asked), HostConfig(workers=1), facts).request
    assert request.num_inference_steps == denoiser.terms.num_inference_steps
    assert request.guidance_scale == denoiser.terms.guidance_scale
    for field, value in [("scheduler", "ddim"), *((name, OTHERS[name]) for name in denoiser.terms.lacks)]:
        with pytest.raises(InvalidRequest, match=field) as error:
            admit(GenerationRequest(**{**asked, field: value}), HostConfig(workers=1), facts)
        assert error.value.param == field


def test_qwen_image_edit_refuses_what_it_has_no_positions_for() -> None:
    pipeline = tiny_qwen_image_edit_plus()
    pipeline.transformer.pos_embed.pos_freqs = pipeline.transformer.pos_embed.pos_freqs[:700]
    denoiser = Denoiser(pipeline)
    begin(denoiser, [1], **SMALL)
    for field in ("prompt", "negative_prompt"):
        says = rf"{field} and pictures come to \d+ tokens, and this model has positions for 69\d; make it"
        with pytest.raises(InvalidRequest, match=says) as refused:
            begin(denoiser, [1], **{**SMALL, field: "a lake" * 100})
        assert refused.value.param == field


# In gangs

TALL: dict[str, Any] = {"height": 160, "width": 64, "num_inference_steps": 8}
SYNC = {"exchange": "sync", "cfg_parallel": False}


class Drawn(NamedTuple):
    """What a rank has at the end."""

    latents: torch.Tensor
    picture: Image.Image
    preview: Image.Image


class Gangs:
    """Gangs of up to four around copies of one model, which hand a state on as bytes.

    Attributes:
        synchronous: of each step that was done, whether it was.
    """

    def __init__(self, make: Callable[[], Any], **config: Any) -> None:
        self._pipelines = [make() for _ in range(4)]
        self._config = ParallelConfig(**config)
        self.synchronous: list[bool] = []

    def draw(self, sizes: tuple[int, ...], **call: Any) -> list[Drawn]:
        """One image by gangs of these sizes, one after the other, each for as many steps."""
        state = begin(Denoiser(self._pipelines[0]), [1], prompt="a lake", **call)
        blob, steps = state.to_bytes(), state.num_steps
        for index, size in enumerate(sizes, 1):
            until = steps * index // len(sizes)
            ranks = run_in_lockstep(size, partial(self._rank, blob, until))
            blob = ranks[0][0]
        return [Drawn(*drawn) for _, *drawn in ranks]

    def _rank(self, blob: bytes, until: int, communicator: Communicator) -> Any:
        """The state after that step as bytes, and when it is done what there is to see."""
        gang = connect("local") if communicator.world_size == 1 else communicator
        pipeline = parallelize(self._pipelines[communicator.rank], gang, self._config)
        denoiser, state, engine = Denoiser(pipeline), DenoiseState.from_bytes(blob), engine_of(pipeline)
        assert engine is not None
        while state.step < until:
            denoiser.step(state)
            if communicator.rank == 0:
                self.synchronous.append(engine.statistics.synchronous)
        denoiser.settle(state)
        if not state.done:
            return (state.to_bytes(),)
        return state.to_bytes(), state.latents, denoiser.decode(state)[0], denoiser.preview(state)


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


@pytest.fixture(scope="module")
def folder(model: str, pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / model
    save(pipeline, folder)
    return folder


def test_a_gang_of_runners_draws_the_picture_of_the_pipeline(
    pipeline: Any, denoiser: Denoiser, folder: Path
) -> None:
    gang = Gang(folder, 2)
    runner = gang.runners[0]
    assert runner.sizes == sizes_of(ModelSpec(name=str(folder))) == denoiser.sizes
    assert runner.terms == terms_of(ModelSpec(name=str(folder))) == denoiser.terms
    assert runner.row_unit == 16
    assert runner.cuts_vae == (not folder.name.startswith(("qwen-image", "hunyuan-image", "krea2")))
    call = {"num_inference_steps": 3}
    asked = shown(denoiser, **call)
    outcome, _ = gang.run(seed=3, **asked)
    (picture,) = outcome.images or ()
    size = {"height": picture.height, "width": picture.width}
    (expected,) = plain(pipeline, [3], output_type="pil", **call, **size)
    assert apart(picture, expected) <= 1
    refused, _ = gang.run(seed=3, **{**asked, "scheduler": "ddim"})
    assert refused.end is SegmentEnd.REFUSED and isinstance(refused.error, InvalidRequest)


@pytest.mark.ray
@pytest.mark.parametrize(
    "model",
    [
        "flux-dev",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "chroma",
                "ernie-image",
                "flux2-klein",
                "flux3",
                "hunyuan-image",
                "qwen-image",
                "qwen-image-2.1",
                "sd3",
                "z-image",
            )
        ),
    ],
)
def test_the_command_line_draws_a_saved_model_with_two_workers(model: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "lake.png"
    save = [sys.executable, "-m", "tests.save_model", model, str(folder)]
    subprocess.run(save, check=True, capture_output=True, text=True, timeout=120)
    options = {"model": folder, "out": out, "gang-size": 2, "exchange": "sync", "seed": 3,
               "height": 160, "width": 64, "num-inference-steps": 4, "cpus": 2}  # fmt: skip
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    command = [sys.executable, "-m", "distriray", "generate", "a lake", *flags]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    (expected,) = plain(MODELS[model](), [3], output_type="pil", **{**TALL, "num_inference_steps": 4})
    assert apart(Image.open(out), expected) <= 1


# Stable Diffusion 3


@pytest.fixture(scope="module")
def sd3() -> Any:
    return tiny_sd3()


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0, "negative_prompt": "fog"},
        {"guidance_scale": 4.0, "negative_prompt": "fog"},
        {"guidance_scale": 4.0, "clip_skip": 0},
        {"guidance_scale": 4.0, "clip_skip": 1},
    ],
)
def test_guidance_and_clip_skip_are_the_pipelines(sd3: Any, call: dict[str, Any]) -> None:
    denoiser = Denoiser(sd3)
    state = begin(denoiser, [3], **SMALL, **call)
    assert torch.equal(finish(denoiser, state), plain(sd3, [3], num_inference_steps=3, **SIZE, **call))


def test_both_branches_are_one_call_of_the_network(sd3: Any) -> None:
    denoiser, batches = Denoiser(sd3), []
    hook = sd3.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: batches.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        finish(denoiser, begin(denoiser, [1, 2], **SMALL))
        finish(denoiser, begin(denoiser, [1, 2], **SMALL, guidance_scale=1.0))
    finally:
        hook.remove()
    assert batches == [4] * 3 + [2] * 3


def test_rescaled_guidance_has_the_contrast_of_the_prompt_alone(sd3: Any) -> None:
    outputs: list[torch.Tensor] = []
    hook = sd3.transformer.register_forward_hook(lambda _, inputs, output: outputs.append(output[0]))
    try:
        denoiser = Denoiser(sd3)
        state = begin(denoiser, [1, 2], **SMALL, guidance_rescale=1.0)
        denoiser.step(state)
    finally:
        hook.remove()
    _, conditional = outputs[0].chunk(2)
    assert state.network_output is not None
    torch.testing.assert_close(state.network_output.output.std((1, 2, 3)), conditional.std((1, 2, 3)))


def test_guidance_halves_of_a_gang_draw_what_the_pipeline_draws(sd3: Any) -> None:
    gangs = Gangs(tiny_sd3, exchange="sync", cfg_parallel=True)
    expected = plain(sd3, [1], **TALL)
    for drawn in gangs.draw((2, 4), **TALL):
        assert differs(drawn.latents, expected) <= LIKENESS


def test_t5_reads_the_prompt_where_a_model_has_it() -> None:
    pipeline = tiny_sd3(t5=True)
    denoiser = Denoiser(pipeline)
    latents = finish(denoiser, begin(denoiser, [1], **SMALL))
    own = {"num_inference_steps": 3, "guidance_scale": 7.0, **SIZE}
    assert torch.equal(latents, plain(pipeline, [1], **own))
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    without = Denoiser(pipeline)
    assert not torch.allclose(finish(without, begin(without, [1], **SMALL)), latents, atol=1e-2)


def test_a_shift_by_the_size_is_the_pipelines() -> None:
    pipeline = tiny_sd3()
    # What diffusers takes where another scheduler has lost it.
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=1.16)
    denoiser = Denoiser(pipeline)
    call = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 64, "width": 160}
    for name in (None, "unipc", "dpmpp-2m"):
        state = begin(denoiser, [1], prompt="a lake", scheduler=name, **call)
        assert torch.equal(finish(denoiser, state), plain(pipeline, [1], named(name, pipeline), **call))
    with pytest.raises(InvalidRequest, match="heun cannot shift by the size") as error:
        begin(denoiser, [1], **SMALL, scheduler="heun")
    assert error.value.param == "scheduler"


def test_a_size_beyond_the_models_positions_is_refused_before_a_step_fails(sd3: Any) -> None:
    denoiser = Denoiser(sd3)
    begin(denoiser, [1], **{**SMALL, "height": 384})
    for side in ("height", "width"):
        with pytest.raises(InvalidRequest, match=f"{side} 400 is above 384") as error:
            begin(denoiser, [1], **{**SMALL, side: 400})
        assert error.value.param == side


def test_a_mask_keeps_the_rest_with_latents_of_any_width() -> None:
    """Which the ordinary pipeline refuses."""
    denoiser = Denoiser(tiny_sd3(channels=4))
    state = begin(denoiser, [1, 2], **SMALL, image=PICTURE, mask_image=MASK)
    latents, picture = finish(denoiser, state), state.values["image_latents"]
    assert torch.equal(latents[..., 6:], picture[..., 6:])
    assert not torch.allclose(latents[..., :6], picture[..., :6], atol=0.5)


def test_pipelines_of_other_classes_are_refused_with_a_list_of_what_is_served(sd3: Any) -> None:
    listed = (
        r"Stable Diffusion 3 and 3.5 \(StableDiffusion3Pipeline, StableDiffusion3Img2ImgPipeline, "
        r"StableDiffusion3InpaintPipeline\)"
    )
    with pytest.raises(UnsupportedModel, match=f"StableDiffusion3PAGPipeline cannot .*{listed}"):
        Denoiser(StableDiffusion3PAGPipeline.from_pipe(sd3))


def test_a_folder_without_t5_is_loaded_and_its_dtype_on_a_gpu_is_bfloat16(
    monkeypatch: pytest.MonkeyPatch, sd3: Any, tmp_path: Path
) -> None:
    """diffusers by itself refuses such a folder."""
    sd3.save_pretrained(tmp_path)
    spec = ModelSpec(name=str(tmp_path))
    loaded = load_pipeline(spec, "cpu")
    assert loaded.text_encoder_3 is None and loaded.transformer.dtype is torch.float32
    kinds: list[torch.dtype] = []
    load = DiffusionPipeline.from_pretrained

    def loads(*args: Any, dtype: torch.dtype, **options: Any) -> Any:
        kinds.append(dtype)
        return load(*args, dtype=dtype, **options)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", loads)
    monkeypatch.setattr(DiffusionPipeline, "to", lambda pipeline, device: pipeline)
    monkeypatch.setattr("distriray.weights.check_fit", lambda modules, device: None)
    half = load_pipeline(spec, "cuda")
    assert kinds == [torch.bfloat16] and half.transformer.dtype is torch.bfloat16


# FLUX.1


@pytest.mark.parametrize("scale", [0.0, 1.0, 6.0])
def test_the_scale_of_guidance_is_an_input_of_flux_dev(scale: float) -> None:
    pipeline = tiny_flux()
    denoiser = Denoiser(pipeline)
    call = {"num_inference_steps": 3, "guidance_scale": scale, **SIZE}
    latents = finish(denoiser, begin(denoiser, [3], prompt="a lake", **call))
    assert torch.equal(latents, plain(pipeline, [3], **call))
    assert not torch.equal(latents, plain(pipeline, [3], **{**call, "guidance_scale": 3.5}))


@pytest.mark.parametrize("make", [tiny_flux, tiny_flux_schnell])
def test_fields_that_ask_flux_for_nothing_are_taken(make: Callable[[], Any]) -> None:
    denoiser = Denoiser(make())
    call = {"guidance_scale": 1.0} if make is tiny_flux_schnell else {}
    nothing = {"negative_prompt": "", "clip_skip": 0, "guidance_rescale": 0.0, **call}
    one, other = begin(denoiser, [1], **SMALL), begin(denoiser, [1], **SMALL, **nothing)
    assert torch.equal(finish(denoiser, one), finish(denoiser, other))


def test_flux_schnell_is_known_by_its_network_and_reads_as_many_tokens_as_it_was_trained_with() -> None:
    dev, schnell = Denoiser(tiny_flux()), Denoiser(tiny_flux_schnell())
    assert (dev.terms.num_inference_steps, dev.terms.guidance_scale) == (28, 3.5)
    assert (schnell.terms.num_inference_steps, schnell.terms.guidance_scale) == (4, 0.0)
    assert "guidance_scale" in schnell.terms.lacks and "guidance_scale" not in dev.terms.lacks
    tokens = [len(begin(each, [1], **SMALL).values["txt_ids"]) for each in (dev, schnell)]
    assert tokens == [512, 256]


def test_flux_fill_fills_in_masks_and_is_refused_as_another_flux() -> None:
    denoiser = Denoiser(tiny_flux_fill())
    assert (denoiser.terms.num_inference_steps, denoiser.terms.guidance_scale) == (50, 30.0)
    for fields, param in (({}, "image"), ({"image": PICTURE}, "mask_image")):
        with pytest.raises(InvalidRequest, match="needs an image and a mask_image") as error:
            begin_as_asked(denoiser, [1], **SMALL, **fields)
        assert error.value.param == param
    with pytest.raises(UnsupportedModel, match="a transformer of 288 channels; .* there are those of 16"):
        Denoiser(FluxPipeline.from_pipe(tiny_flux_fill()))
    with pytest.raises(UnsupportedModel, match="a transformer of 16 channels; .* there are those of 288"):
        Denoiser(FluxFillPipeline.from_pipe(tiny_flux()))


# Qwen-Image


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.0, "negative_prompt": "fog"},
        {"guidance_scale": 3.0, "negative_prompt": "fog over all of the lake, " * 30},  # more than it reads
    ],
)
def test_guidance_of_qwen_image_is_the_pipelines(call: dict[str, Any]) -> None:
    """Whatever the lengths of the texts."""
    pipeline = tiny_qwen_image()
    denoiser = Denoiser(pipeline)
    state = begin(denoiser, [3, 4], **SMALL, **call)
    expected = plain(pipeline, [3, 4], num_inference_steps=3, **SIZE, **call)
    assert torch.equal(finish(denoiser, state), expected)


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


@pytest.mark.parametrize("call", [{}, {"negative_prompt": "fog"}, {"guidance_scale": 1.0}])
def test_guidance_of_chroma_is_the_pipelines(call: dict[str, Any]) -> None:
    pipeline = tiny_chroma()
    denoiser = Denoiser(pipeline)
    state = begin(denoiser, [3, 4], **SMALL, **call)
    expected = plain(pipeline, [3, 4], num_inference_steps=3, **SIZE, **call)
    assert torch.equal(finish(denoiser, state), expected)


def test_qwen_image_that_takes_guidance_as_an_input_is_refused() -> None:
    pipeline = tiny_qwen_image()
    pipeline.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(UnsupportedModel, match="QwenImageTransformer2DModel with guidance_embeds"):
        Denoiser(pipeline)


def test_what_qwen_image_does_not_read_of_a_prompt_is_said() -> None:
    """It reads 512 tokens, here of a byte each; what comes behind them changes nothing."""
    denoiser = Denoiser(tiny_qwen_image())
    longer, other = (
        begin(denoiser, [1], **{**SMALL, "prompt": "a" * 512 + end, "negative_prompt": "fog"})
        for end in ("bcd", "xyz")
    )
    assert longer.warnings == ("prompt has 515 tokens, and a text encoder takes 512: the rest is not used",)
    assert torch.equal(longer.values["prompt_embeds"], other.values["prompt_embeds"])
    assert not begin(denoiser, [1], **{**SMALL, "prompt": "a" * 512}).warnings


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (tiny_sd3, 75),
        (partial(tiny_sd3, t5=True), 254),
        (tiny_flux, 510),
        (tiny_flux_schnell, 254),
        (tiny_chroma, 510),
        (tiny_z_image, 464),  # 48 letters of a template are around it
        (tiny_hunyuan_image, 854),  # 180 of one are before it
        (tiny_longcat_image, 512),
        (tiny_ovis_image, 102),  # 182 around, of 284
        (tiny_krea2, 361),  # 180 before, of 541
    ],
)
def test_a_prompt_is_said_to_be_cut_where_no_encoder_takes_all_of_it(
    make: Callable[[], Any], most: int
) -> None:
    """With a tokenizer of a token a letter and two special ones, also in T5's place."""
    denoiser = Denoiser(make())

    def warnings(letters: int) -> tuple[str, ...]:
        params = SamplingParams(prompt="x" * letters, seed=1, num_inference_steps=1, **SIZE)
        return denoiser.prepare(params).warnings

    assert warnings(most) == ()
    (said,) = warnings(most + 9)
    assert said.startswith(f"prompt has {most + 9} tokens, and a text encoder takes {most}:")


def test_a_second_branch_is_taken_by_guidance_alone(model: str, denoiser: Denoiser, pipeline: Any) -> None:
    batches: list[int] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, inputs, named: batches.append(len(named.get("hidden_states", named.get("x")))),
        with_kwargs=True,
    )
    scale = denoiser.terms.unguided
    for guidance_scale in (scale, scale + 1) if denoiser.guides else (scale,):
        batches.clear()
        denoiser.step(begin(denoiser, [1], **SMALL, guidance_scale=guidance_scale))
        assert sum(batches) == 1 + (guidance_scale > scale)
        assert len(batches) == 1 + (guidance_scale > scale and model in BRANCHES_APART)
    hook.remove()


def test_what_would_be_black_is_refused_by_name(model: str) -> None:
    pipeline = MODELS[model]()
    denoiser = Denoiser(pipeline)
    state = begin(denoiser, [1], **SMALL)
    denoiser.step(state)
    pipeline.vae.decoder.conv_out.bias.data[0] = float("nan")
    with pytest.raises(NotFinite, match="the decoded pixels"):
        denoiser.decode(state)
    state.latents[0, 0, 1, 1] = float("nan")
    with pytest.raises(NotFinite, match="the latents after step 1"):
        denoiser.decode(state)


def test_what_the_system_says_is_the_users_own() -> None:
    pipeline = tiny_flux2()
    before = finish(Denoiser(pipeline), begin(Denoiser(pipeline), [1], **SMALL))
    pipeline.tokenizer.chat_template = "{{ messages[0].content[0].text }}{{ messages[1].content[0].text }}"
    pipeline.system_message = "See."
    denoiser = Denoiser(pipeline)
    said = finish(denoiser, begin(denoiser, [1], **SMALL))
    assert not torch.equal(said, before)
    assert torch.equal(said, plain(pipeline, [1], num_inference_steps=3, **SIZE))


# FLUX.3


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 1.0},
        {"negative_prompt": "fog"},
        {"negative_prompt": "fog over all of the lake, " * 8},  # of more tokens than the prompt is padded to
        {"guidance_rescale": 0.7},
    ],
)
def test_guidance_of_flux3_is_the_pipelines(call: dict[str, Any]) -> None:
    pipeline = tiny_flux3()
    denoiser = Denoiser(pipeline)
    state = begin(denoiser, [3, 4], **SMALL, **call)
    expected = plain(pipeline, [3, 4], num_inference_steps=3, **SIZE, **call)
    assert torch.equal(finish(denoiser, state), expected)


def test_flux3_knows_the_base_and_the_distilled_one() -> None:
    base, distilled = Denoiser(tiny_flux3()), Denoiser(tiny_flux3_distilled())
    assert (base.terms.num_inference_steps, base.terms.guidance_scale) == (50, 3.5)
    assert (distilled.terms.num_inference_steps, distilled.terms.guidance_scale) == (16, 1.0)
    assert (base.guides, distilled.guides) == (True, False)
    state = begin(base, [1], **SMALL)
    with pytest.raises(InvalidRequest, match="Flux3Modular cannot go on with a model of Flux3Distilled"):
        distilled.step(state)


def test_the_network_of_a_distilled_flux3_is_told_where_each_step_goes() -> None:
    pipeline, told = tiny_flux3_distilled(), list[tuple[float, float]]()
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args, given: told.append((float(given["timestep"]), float(given["target_timestep"]))),
        with_kwargs=True,
    )
    denoiser = Denoiser(pipeline)
    finish(denoiser, begin(denoiser, [1], **SMALL))
    (first, second, third) = told
    assert 1.0 == first[0] > first[1] == second[0] > second[1] == third[0] > third[1] == 0.0


def change_pad(pipeline: Any) -> None:
    pipeline._blocks.sub_blocks["text_encoder"].pad_multiple = 40


def drop_decoder(pipeline: Any) -> None:
    pipeline._blocks.sub_blocks.pop("decode")


def change_guider(pipeline: Any) -> None:
    pipeline.update_components(guider=AdaptiveProjectedGuidance())


def turn_formula(pipeline: Any) -> None:
    pipeline.update_components(guider=pipeline.guider.new(use_original_formulation=True))


def change_network(pipeline: Any) -> None:
    network = tiny_flux3_transformer(joint_attention_dim=8 * TEXT_WIDTH, flow_map=True)
    pipeline.update_components(transformer=network)


def drop_vae(pipeline: Any) -> None:
    pipeline.update_components(vae=None)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (change_pad, "blocks other than those of Flux3AutoBlocks, or changed ones"),
        (drop_decoder, "blocks other than those of Flux3AutoBlocks"),
        (change_guider, "a guider other than diffusers' ClassifierFreeGuidance"),
        (turn_formula, "a guider other than diffusers' ClassifierFreeGuidance"),
        (change_network, "around a Flux3Transformer2DModel with flow_map"),
        (drop_vae, "without vae cannot be denoised step by step"),
    ],
)
def test_a_flux3_of_another_recipe_is_refused(change: Callable[[Any], None], says: str) -> None:
    pipeline = tiny_flux3()
    change(pipeline)
    with pytest.raises(UnsupportedModel, match=f"Flux3ModularPipeline .*{says}"):
        Denoiser(pipeline)


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
