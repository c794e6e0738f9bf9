"""diffusers' own pipelines of flow matching, called for what a request asks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import (
    ChromaInpaintPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
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
    UniPCMultistepScheduler,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImagePipeline,
)

from distriray.denoise import Denoiser
from distriray.denoise.pipelines.registry import PIPELINES, family_of
from tests.edits import FILLED, SHOWN, TO_FILL, sized
from tests.guiding import guiders_with
from tests.unit.flow_matching.families import SMALL, begin, skip_unless_it_begins_from_pictures
from tests.unit.test_denoise import SIZE, finish, generators

BY_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


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


def check_numbers(pipeline: Any, **call: Any) -> None:
    """Two images of three steps, bit for bit what diffusers' own pipeline gives for the same call."""
    denoiser = Denoiser(pipeline)
    state = begin(denoiser, [3, 4], **SMALL, **call)
    expected = plain(pipeline, [3, 4], num_inference_steps=3, **SIZE, **call)
    assert torch.equal(finish(denoiser, state), expected)


def by_guider(pipeline: ModularPipeline, **call: Any) -> dict[str, Any]:
    """A call without what is said of guidance, which is told the guider, if the pipeline has one."""
    guider = pipeline.components.get("guider")
    scale, rescale = call.pop("guidance_scale", 3.5), call.pop("guidance_rescale", 0.0)
    if guider is not None:
        pipeline.update_components(guider=guider.new(guidance_scale=scale, guidance_rescale=rescale))
    return call


def on_pictures(pipeline: Any, task: str) -> Any:
    """diffusers' pipeline for that task around the same models."""
    skip_unless_it_begins_from_pictures(pipeline)
    family = PIPELINES[family_of(pipeline)]
    other = family.steps.kinds[family.tasks.index(task)].from_pipe(pipeline)
    if isinstance(other, ChromaInpaintPipeline):  # which asks for what no network of Chroma has
        other.transformer.register_to_config(guidance_embeds=False)
    other.set_progress_bar_config(disable=True)
    return other


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
