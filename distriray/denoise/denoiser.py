"""Drives a pipeline one step at a time."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from PIL import Image

from distriray.denoise.blocks import DECODE, make_components, make_tasks, set_guidance
from distriray.denoise.network_output import NetworkOutput
from distriray.denoise.schedulers import make_scheduler, scheduler_class
from distriray.denoise.state import DenoiseState
from distriray.errors import GangBroken, GangMismatch, InvalidRequest, UnsupportedModel
from distriray.parallel import engine_of
from distriray.requests import SamplingParams

PREVIEW_SCALE, PREVIEW_LATENT_SIDE = 0.25, 16  # of the picture, with at most this many latent rows


class Denoiser:
    """prepare, step x n, decode for a Stable Diffusion XL pipeline, parallelized or not.

    The steps are diffusers' modular blocks; the models are the pipeline's own. One thread uses a denoiser at
    a time, for any number of states in any order.

    Args:
        pipeline: a `StableDiffusionXLPipeline` or one made from it.

    Attributes:
        needs_image: whether the U-Net takes a picture and its mask besides the latents.

    Raises:
        UnsupportedModel: the pipeline is not Stable Diffusion XL's, is its refiner, or has a scheduler that
            cannot be part of a state.
    """

    def __init__(self, pipeline: Any) -> None:
        _check(pipeline)
        self._pipeline = pipeline
        self._components = make_components(pipeline)
        self._tasks = make_tasks()
        self._decode = DECODE()
        takes, latents = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
        self.needs_image = takes != latents
        self._last: weakref.ref[DenoiseState] | None = None  # whose step came last,
        self._last_at = (-1, -1)  # where that left it, and by which gang
        self._image: AbstractContextManager[Any] | None = None  # in that gang

    @torch.no_grad()
    def prepare(
        self,
        params: SamplingParams,
        *,
        image: Image.Image | None = None,
        mask_image: Image.Image | None = None,
        strength: float = 0.3,
    ) -> DenoiseState:
        """Encode the prompt and draw the noise: the state before the first step.

        Args:
            params: must have a seed; image `i` of any batch is the image of its seed alone.
            image: starts from this picture (image to image), or fills in where `mask_image` is white.
            strength: share of the steps that are done on `image`, above 0 and at most 1.

        Raises:
            InvalidRequest: a value is out of range; `param` names it.
        """
        seeds, num_inference_steps = params.seeds, params.num_inference_steps
        if mask_image is not None and image is None:
            raise InvalidRequest("a mask_image needs an image", "image")
        if not 0.0 < strength <= 1.0:
            raise InvalidRequest(f"strength {strength} is not above 0 and at most 1", "strength")
        if self.needs_image and mask_image is None:
            raise InvalidRequest("this model fills in masks, and needs an image and a mask_image", "image")
        task = "text-to-image" if image is None else "image-to-image" if mask_image is None else "inpainting"
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        components = self._components
        components.scheduler = make_scheduler(self._pipeline.scheduler, params.scheduler)
        set_guidance(components, params.guidance_scale, params.guidance_rescale)
        pixels = components.vae_scale_factor * components.default_sample_size
        height = pixels if params.height is None else params.height
        width = pixels if params.width is None else params.width
        multiple = components.vae_scale_factor
        for name, size in (("height", height), ("width", width)):
            if size % multiple:
                raise InvalidRequest(f"{name} {size} is not a multiple of {multiple}", name)
        encoders = [e for e in (components.text_encoder, components.text_encoder_2) if e is not None]
        most = min(encoder.config.num_hidden_layers for encoder in encoders) - 1
        if params.clip_skip is not None and params.clip_skip > most:
            raise InvalidRequest(
                f"clip_skip {params.clip_skip} skips all of a text encoder; use at most {most}", "clip_skip"
            )

        state = PipelineState()
        for name, value in {
            "prompt": params.prompt,
            "negative_prompt": params.negative_prompt,
            "clip_skip": params.clip_skip,
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps,
            "num_images_per_prompt": len(seeds),
            "generator": generators,
            # One each, so that every image is drawn with its own generator.
            "image": None if image is None else [image.convert("RGB")] * len(seeds),
            "mask_image": None if mask_image is None else [mask_image] * len(seeds),
            "strength": strength,
        }.items():
            state.set(name, value)
        try:
            for block in self._tasks[task].before:
                _, state = block(components, state)
        except InvalidRequest:
            raise
        except ValueError as error:  # diffusers' own word for arguments that do not go together
            raise InvalidRequest(f"the pipeline does not take this request: {error}") from error
        loop = self._tasks[task].loop
        conditioning = tuple(dict.fromkeys(state.kwargs_mapping.get("denoiser_input_fields", ())))
        kept = ({p.name for p in loop.inputs} | set(conditioning)) - {"generator", None}
        values = {name: _contiguous(value) for name, value in state.values.items() if name in kept}
        values = {name: value for name, value in values.items() if value is not None}
        if not len(values["timesteps"]):
            raise InvalidRequest(
                f"strength {strength} of {num_inference_steps} steps leaves none to do", "strength"
            )
        end = components.scheduler.config.num_train_timesteps
        if values["timesteps"].max() >= end:
            raise InvalidRequest(
                f"num_inference_steps {num_inference_steps} is too many for this scheduler, which has {end} "
                "timesteps to choose from; use fewer",
                "num_inference_steps",
            )
        return DenoiseState(
            task=task,
            values=values,
            conditioning=conditioning,
            scheduler=components.scheduler,
            generators=generators,
            guidance_scale=params.guidance_scale,
            guidance_rescale=params.guidance_rescale,
            height=height,
            width=width,
        ).to(values["latents"].device)

    @torch.no_grad()
    def step(self, state: DenoiseState) -> None:
        """Do the next step of `state`, in place; if it raises, the state is as it was.

        In a gang of GPUs a displaced step that is not the last returns before it is known to have gone well.
        If it has not, the next one raises, and the state is as it was before both. `settle` a state before
        it leaves its gang between two steps.

        Raises:
            GenerationCancelled, GangBroken, GangMismatch: from the gang.
            ValueError: the state is done.
        """
        if state.done:
            raise ValueError(f"all {state.num_steps} steps are done")
        task, components = self._tasks[state.task], self._components
        components.scheduler = state.scheduler
        set_guidance(components, state.guidance_scale, state.guidance_rescale)
        self._follow(state, task)
        pipeline_state = PipelineState()
        for name, value in state.values.items():
            pipeline_state.set(name, value, "denoiser_input_fields" if name in state.conditioning else None)
        pipeline_state.set("generator", state.generators)
        block_state = task.loop.get_block_state(pipeline_state)
        timestep, before = state.values["timesteps"][state.step], block_state.latents
        engine = engine_of(self._pipeline)
        self._last, snapshot = None, state.snapshot()
        try:
            with self._image or nullcontext():
                if engine is not None and state.step + 1 < state.num_steps:
                    engine.announce_more()
                block_state = task.step(components, block_state, i=state.step, t=timestep)
        except BaseException as error:
            broken = isinstance(error, GangBroken | GangMismatch)
            state.restore(state.unsettled if broken and state.unsettled is not None else snapshot)
            raise
        state.network_output = NetworkOutput(before, block_state.noise_pred, timestep)
        state.values["latents"] = _contiguous(block_state.latents)
        state.step += 1
        state.unsettled = None if engine is None or engine.settled else snapshot
        self._last, self._last_at = weakref.ref(state), (state.step, self._gang)

    def settle(self, state: DenoiseState) -> None:
        """Wait until the last step of `state` is known to have gone well. All ranks alike.

        Raises:
            GangBroken, GangMismatch: from the gang; the state is as it was before that step.
            GenerationCancelled: from the gang.
        """
        engine, before = engine_of(self._pipeline), state.unsettled
        if engine is None or before is None:
            return
        try:
            engine.settle()
        except (GangBroken, GangMismatch):
            state.restore(before)
            raise
        finally:
            state.unsettled = None

    @torch.no_grad()
    def decode(self, state: DenoiseState) -> list[Image.Image]:
        """The pictures of the latents as they are.

        With a parallel VAE all ranks of the gang call it, and all get the pictures.

        Raises:
            GangBroken: from the gang.
        """
        pipeline_state = PipelineState()
        pipeline_state.set("latents", state.latents.to(self._components.vae.dtype))
        pipeline_state.set("output_type", "pil")
        _, pipeline_state = self._decode(self._components, pipeline_state)
        images: list[Image.Image] = pipeline_state.get("images")
        return images

    @torch.no_grad()
    def preview(self, state: DenoiseState) -> Image.Image:
        """The first image as it is predicted to become, at a quarter of its size, 128 pixels at most.

        Any rank may call it, alone.
        """
        estimate = state.estimate
        latents = (state.latents if estimate is None else estimate)[:1]
        scale = min(PREVIEW_SCALE, PREVIEW_LATENT_SIDE / max(latents.shape[2:]))
        sides = [max(1, round(scale * side)) for side in latents.shape[2:]]
        latents = F.interpolate(latents.float(), size=sides, mode="area")
        small = PipelineState()
        small.set("latents", latents.to(self._components.vae.dtype))
        small.set("output_type", "pil")
        engine = engine_of(self._pipeline)
        with engine.decoder.alone() if engine is not None and engine.decoder is not None else nullcontext():
            _, small = self._decode(self._components, small)
        preview: Image.Image = small.get("images")[0]
        return preview

    @property
    def _gang(self) -> int:
        engine = engine_of(self._pipeline)
        return -1 if engine is None else engine.generation

    def _follow(self, state: DenoiseState, task: Any) -> None:
        """Unless this continues the previous step, begin an image and drop the cached prompt."""
        engine = engine_of(self._pipeline)
        same = self._last is not None and self._last() is state and self._last_at == (state.step, self._gang)
        if same and not (engine is not None and engine.yielding):
            return
        last = None if self._last is None else self._last()
        if last is not None:
            self.settle(last)
        self._image = None  # so that its buffers are the next one's
        if engine is not None:
            self._image = engine.image(at_step=state.step, num_steps=state.num_steps)
        task.denoiser.batched = None


def _check(pipeline: Any) -> None:
    """Raise `UnsupportedModel` for a pipeline of which no request could be drawn."""
    what, components = type(pipeline).__name__, getattr(pipeline, "components", {})
    if components.get("text_encoder_2") is None or components.get("unet") is None:
        raise UnsupportedModel(f"{what} cannot be denoised step by step; Stable Diffusion XL can")
    if pipeline.config.get("requires_aesthetics_score") or components.get("text_encoder") is None:
        raise UnsupportedModel(f"{what} is SDXL's refiner, which goes on from another model's latents")
    try:
        scheduler_class(type(components["scheduler"]).__name__)
    except InvalidRequest as error:
        raise UnsupportedModel(
            f"the model's own {error}; save the model with a scheduler of these names"
        ) from error


def _contiguous(value: Any) -> Any:
    """A tensor in the memory layout that bytes restore: other layouts round differently."""
    return value.contiguous() if isinstance(value, torch.Tensor) else value
