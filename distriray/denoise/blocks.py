"""The modular SDXL blocks of diffusers, and the one that calls the network: all that is experimental."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import BlockState, ModularPipelineBlocks
from diffusers.modular_pipelines.stable_diffusion_xl.before_denoise import StableDiffusionXLInputStep
from diffusers.modular_pipelines.stable_diffusion_xl.decoders import StableDiffusionXLDecodeStep
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import (
    StableDiffusionXLDenoiseStep,
    StableDiffusionXLInpaintDenoiseStep,
    StableDiffusionXLLoopDenoiser,
)
from diffusers.modular_pipelines.stable_diffusion_xl.encoders import (
    StableDiffusionXLInpaintVaeEncoderStep,
    StableDiffusionXLTextEncoderStep,
    StableDiffusionXLVaeEncoderStep,
)
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
    StableDiffusionXLAutoBlocks,
    StableDiffusionXLBeforeDenoiseStep,
    StableDiffusionXLImg2ImgBeforeDenoiseStep,
    StableDiffusionXLInpaintBeforeDenoiseStep,
)


class BatchedDenoiser(StableDiffusionXLLoopDenoiser):
    """Both guidance branches in one call of the network, as a batch [unconditional, conditional].

    diffusers' own block calls the network once a branch; a gang splits that batch between its halves.
    `batched` keeps the concatenated embeddings of the image at hand, so that they stay one object.
    """

    def __init__(self) -> None:
        super().__init__()
        self.batched: dict[str, torch.Tensor] | None = None

    @torch.no_grad()
    def __call__(self, components: Any, block_state: BlockState, i: int, t: torch.Tensor) -> tuple[Any, Any]:
        guider = components.guider
        # Of all stages: a second-order scheduler has two a step, and the guider stops after the last it knows.
        guider.set_state(step=i, num_inference_steps=len(block_state.timesteps), timestep=t)
        names = {
            "prompt_embeds": "prompt_embeds",
            "text_embeds": "pooled_prompt_embeds",
            "time_ids": "add_time_ids",
        }
        inputs = {
            name: (getattr(block_state, source), getattr(block_state, f"negative_{source}", None))
            for name, source in names.items()
        }
        branches = list(reversed(guider.prepare_inputs(inputs)))
        if self.batched is None:
            self.batched = {name: torch.cat([getattr(b, name) for b in branches]) for name in names}
        noise = components.unet(
            torch.cat([block_state.scaled_latents] * len(branches)),
            t,
            encoder_hidden_states=self.batched["prompt_embeds"],
            timestep_cond=block_state.timestep_cond,
            cross_attention_kwargs=block_state.cross_attention_kwargs,
            added_cond_kwargs={name: self.batched[name] for name in ("text_embeds", "time_ids")},
            return_dict=False,
        )[0]
        for branch, part in zip(branches, noise.chunk(len(branches)), strict=True):
            branch.noise_pred = part
        block_state.noise_pred = guider(list(reversed(branches)))[0]
        return components, block_state


class Task:
    """The blocks of one task: what comes before the loop, and the loop."""

    def __init__(self, before: list[ModularPipelineBlocks], loop: Any) -> None:
        self.before = before
        self.loop = loop
        self.denoiser = BatchedDenoiser()
        loop.sub_blocks["denoiser"] = self.denoiser


def make_tasks() -> dict[str, Task]:
    """Text to image, image to image and inpainting."""

    def before(encode: list[Any], prepare: Any) -> list[Any]:
        return [StableDiffusionXLTextEncoderStep(), *encode, StableDiffusionXLInputStep(), prepare]

    return {
        "text-to-image": Task(
            before([], StableDiffusionXLBeforeDenoiseStep()), StableDiffusionXLDenoiseStep()
        ),
        "image-to-image": Task(
            before([StableDiffusionXLVaeEncoderStep()], StableDiffusionXLImg2ImgBeforeDenoiseStep()),
            StableDiffusionXLDenoiseStep(),
        ),
        "inpainting": Task(
            before([StableDiffusionXLInpaintVaeEncoderStep()], StableDiffusionXLInpaintBeforeDenoiseStep()),
            StableDiffusionXLInpaintDenoiseStep(),
        ),
    }


def make_components(pipeline: Any) -> Any:
    """What the blocks read their models from: the pipeline's own, not copied."""
    components = StableDiffusionXLAutoBlocks().init_pipeline()
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae", "scheduler")
    components.update_components(**{name: pipeline.components[name] for name in names})
    components.register_to_config(
        force_zeros_for_empty_prompt=pipeline.config.get("force_zeros_for_empty_prompt", True)
    )
    return components


def set_guidance(components: Any, scale: float, rescale: float) -> None:
    """Classifier-free guidance of that scale; off at 1 and below."""
    guider = components.guider
    guider.guidance_scale, guider.guidance_rescale = scale, rescale if scale > 1.0 else 0.0
    if scale > 1.0:
        guider.enable()
    else:
        guider.disable()


DECODE = StableDiffusionXLDecodeStep
