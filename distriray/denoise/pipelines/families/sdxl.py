"""Stable Diffusion XL, by diffusers' modular blocks."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from diffusers.modular_pipelines.stable_diffusion_xl.decoders import StableDiffusionXLDecodeStep
from PIL import Image

from distriray.denoise.pipelines.base import Commission, TokenCount, check_pixels, tokens_of
from distriray.denoise.pipelines.control import UNetSteps
from distriray.denoise.pipelines.families.sdxl_blocks import make_components, make_tasks, set_guidance
from distriray.denoise.state import DenoiseState
from distriray.errors import UnsupportedModel


class StableDiffusionXL(UNetSteps):
    """A pipeline with SDXL's two text encoders.

    A state keeps what its blocks hand on, and the names of the conditional inputs in `conditioning`.
    """

    kinds = (StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline)

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self.components = make_components(pipeline)
        self._tasks = make_tasks(self.kept_texts)
        self._decode = StableDiffusionXLDecodeStep()

    def check(self) -> None:
        components, what = self.pipeline.components, type(self.pipeline).__name__
        for name in ("text_encoder_2", "unet"):
            if components[name] is None:
                raise UnsupportedModel(f"{what} without {name} cannot be denoised step by step")
        if self.pipeline.config.get("requires_aesthetics_score") or components["text_encoder"] is None:
            raise UnsupportedModel(f"{what} is SDXL's refiner, which goes on from another model's latents")

    @property
    def guides(self) -> bool:
        return self.components.unet.config.time_cond_proj_dim is None

    @property
    def max_clip_skip(self) -> int:
        encoders = (self.components.text_encoder, self.components.text_encoder_2)
        return min(encoder.config.num_hidden_layers for encoder in encoders) - 1

    def tokens(self, text: str) -> list[TokenCount]:
        tokenizers = (self.components.tokenizer, self.components.tokenizer_2)
        return [tokens_of(each, self.components.maybe_convert_prompt(text, each)) for each in tokenizers]

    def prepare(self, commission: Commission) -> dict[str, Any]:
        params, components, images = commission.params, self.components, len(commission.generators)
        components.scheduler = commission.scheduler
        set_guidance(components, commission.guidance_scale, params.guidance_rescale)
        image, mask_image = commission.image, commission.mask_image
        negative_prompt = params.negative_prompt
        if negative_prompt is None and params.negative_prompt_2:
            negative_prompt = ""  # without the first, diffusers would take no notice of the second
        state = PipelineState()
        for name, value in {
            "prompt": params.prompt,
            "negative_prompt": negative_prompt,
            "prompt_2": params.prompt_2,
            "negative_prompt_2": params.negative_prompt_2,
            "original_size": _high_and_wide(params.original_size),
            "target_size": _high_and_wide(params.target_size),
            "crops_coords_top_left": _top_and_left(params.crops_coords_top_left),
            "clip_skip": params.clip_skip,
            "height": commission.height,
            "width": commission.width,
            "num_inference_steps": params.num_inference_steps,
            "num_images_per_prompt": images,
            "generator": commission.generators,
            # One each, so that every image is drawn with its own generator.
            "image": None if image is None else [image] * images,
            "mask_image": None if mask_image is None else [mask_image] * images,
            "strength": commission.strength,
        }.items():
            state.set(name, value)
        task = self._tasks[commission.task]
        for block in task.before:
            _, state = block(components, state)
            if (timesteps := state.get("timesteps")) is not None:
                commission.check_timesteps(timesteps)
        conditioning = tuple(dict.fromkeys(state.kwargs_mapping.get("denoiser_input_fields", ())))
        kept = ({p.name for p in task.loop.inputs} | set(conditioning)) - {"generator", None}
        values = {name: value for name, value in state.values.items() if name in kept}
        return {**values, "conditioning": conditioning}

    def begin(self, state: DenoiseState) -> None:
        self._tasks[state.task].denoiser.batched = {}

    def step(self, state: DenoiseState) -> tuple[torch.Tensor, torch.Tensor]:
        task, components = self._tasks[state.task], self.components
        components.scheduler = state.scheduler
        scale = 1.0 if state.guidance_over else state.guidance_scale
        set_guidance(components, scale, state.guidance_rescale)
        blackboard = PipelineState()
        for name, value in state.values.items():
            conditional = name in state.values["conditioning"]
            blackboard.set(name, value, "denoiser_input_fields" if conditional else None)
        blackboard.set("generator", state.generators)
        block_state = task.loop.get_block_state(blackboard)
        timestep = state.values["timesteps"][state.step]
        task.denoiser.controls, task.denoiser.image_prompts = self.controls, self.image_prompts
        block_state = task.step(components, block_state, i=state.step, t=timestep)
        return block_state.latents, block_state.noise_pred

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        blackboard = PipelineState()
        blackboard.set("latents", latents.to(self.components.vae.dtype))
        blackboard.set("output_type", "pt")
        _, blackboard = self._decode(self.components, blackboard)
        pixels, processor = blackboard.get("images"), self.components.image_processor
        check_pixels(pixels)
        images: list[Image.Image] = processor.numpy_to_pil(processor.pt_to_numpy(pixels))
        return images


def _high_and_wide(sides: str | None) -> tuple[int, int] | None:
    """(height, width), as diffusers has it, of a width and a height as `SamplingParams` has them."""
    if sides is None:
        return None
    width, height = map(int, sides.split("x"))
    return height, width


def _top_and_left(place: str | None) -> tuple[int, int]:
    """(top, left), as diffusers has it."""
    left, top = map(int, (place or "0,0").split(","))
    return top, left
