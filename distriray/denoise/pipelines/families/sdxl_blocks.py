"""The modular SDXL blocks of diffusers, and the one that calls the network: all that is experimental."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import BlockState, ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.stable_diffusion_xl.before_denoise import (
    StableDiffusionXLImg2ImgPrepareAdditionalConditioningStep,
    StableDiffusionXLImg2ImgPrepareLatentsStep,
    StableDiffusionXLImg2ImgSetTimestepsStep,
    StableDiffusionXLInpaintPrepareLatentsStep,
    StableDiffusionXLInputStep,
)
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
)
from diffusers.modular_pipelines.stable_diffusion_xl.modular_pipeline import StableDiffusionXLModularPipeline
from diffusers.utils.torch_utils import randn_tensor

from distriray.denoise.pipelines.control import controlled
from distriray.denoise.pipelines.image_prompts import ImagePrompt
from distriray.denoise.pipelines.kept_texts import KeptTexts
from distriray.parallel.networks.controls import UsedControl


class TextEncoder(StableDiffusionXLTextEncoderStep):
    """Reads texts that are not in `texts`."""

    def __init__(self, texts: KeptTexts) -> None:
        super().__init__()
        self._texts = texts

    def encode_prompt(self, components: Any, *args: Any, **kwargs: Any) -> Any:
        return self._texts.of(functools.partial(super().encode_prompt, components), *args, **kwargs)


class BatchedDenoiser(StableDiffusionXLLoopDenoiser):
    """Both guidance branches in one call of the network, as a batch [unconditional, conditional].

    diffusers' own block calls the network once a branch; a gang splits that batch between its halves.
    `batched` keeps the concatenated embeddings of the image at hand by the number of its branches, so that
    they stay one object; `controls` are the ControlNets of the step, `image_prompts` its IP-Adapters'.
    """

    def __init__(self) -> None:
        super().__init__()
        self.batched: dict[int, dict[str, torch.Tensor]] = {}
        self.controls: tuple[UsedControl, ...] = ()
        self.image_prompts: tuple[ImagePrompt, ...] = ()

    @torch.no_grad()
    def __call__(
        self, components: Any, block_state: BlockState, i: int, t: torch.Tensor
    ) -> tuple[Any, BlockState]:
        guider = components.guider
        # Count stages, of which a second-order scheduler has two a step: past the last, the guider stops.
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
        if len(branches) not in self.batched:
            texts = {name: torch.cat([getattr(b, name) for b in branches]) for name in names}
            self.batched[len(branches)] = texts
        batched = self.batched[len(branches)]
        noise = controlled(
            components.unet,
            self.controls,
            self.image_prompts,
            len(branches),
            torch.cat([block_state.scaled_latents] * len(branches)),
            t,
            encoder_hidden_states=batched["prompt_embeds"],
            timestep_cond=block_state.timestep_cond,
            cross_attention_kwargs=block_state.cross_attention_kwargs,
            added_cond_kwargs={name: batched[name] for name in ("text_embeds", "time_ids")},
            return_dict=False,
        )[0]
        for branch, part in zip(branches, noise.chunk(len(branches)), strict=True):
            branch.noise_pred = part
        block_state.noise_pred = guider(list(reversed(branches)))[0]
        return components, block_state


class Components(StableDiffusionXLModularPipeline):
    """Says 4 for every network that takes latents alone, which is what the inpainting blocks ask for."""

    @property
    def num_channels_unet(self) -> int:
        channels: int = self.unet.config.in_channels
        return 4 if channels == self.num_channels_latents else channels


class PrepareLatents(StableDiffusionXLImg2ImgPrepareLatentsStep):
    """Noise on the picture's latents, however many channels those have; diffusers' block takes only four."""

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        latents, generator = state.get("image_latents"), state.get("generator")
        noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        state.set("latents", components.scheduler.add_noise(latents, noise, state.get("latent_timestep")))
        return components, state


class InpaintVaeEncoder(StableDiffusionXLInpaintVaeEncoderStep):
    """Leaves the masked picture as it is: it is encoded after the noise is drawn, as the pipeline does it."""

    # The inpainting block's own reads `self.vae`, which it has not, where a VAE has latent means.
    _encode_vae_image = StableDiffusionXLVaeEncoderStep._encode_vae_image

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        generators = state.get("generator")
        before = [generator.get_state() for generator in generators]
        components, state = super().__call__(components, state)
        if components.num_channels_unet != 4 and state.get("strength") == 1.0:
            # All begins from noise, and the network takes the masked picture: this one is not looked at.
            for generator, drawn in zip(generators, before, strict=True):
                generator.set_state(drawn)
        return components, state

    def prepare_mask_latents(
        self, components: Any, mask: torch.Tensor, masked_image: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return mask, masked_image


class InpaintPrepareLatents(StableDiffusionXLInpaintPrepareLatentsStep):
    """Draws in the order of the ordinary pipeline, so that a seed gives the same picture."""

    def prepare_latents_inpaint(
        self,
        components: Any,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: list[torch.Generator],
        latents: None,
        *,
        image: torch.Tensor,
        timestep: torch.Tensor,
        is_strength_max: bool,
        add_noise: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scheduler = components.scheduler
        noise = randn_tensor(image.shape, generator=generator, device=image.device, dtype=image.dtype)
        if is_strength_max:
            return noise * scheduler.init_noise_sigma, noise, image
        return scheduler.add_noise(image, noise, timestep), noise, image

    def prepare_mask_latents(
        self,
        components: Any,
        mask: torch.Tensor,
        masked_image: torch.Tensor | None,
        batch_size: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: list[torch.Generator],
    ) -> Any:
        if masked_image is None:  # a network of four channels; the pipeline encodes it for nothing
            scale = components.vae_scale_factor
            shape = (batch_size, components.num_channels_latents, height // scale, width // scale)
            randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return super().prepare_mask_latents(
            components, mask, masked_image, batch_size, height, width, dtype, device, generator
        )


class Task:
    """The blocks of one task: what comes before the loop, and the loop."""

    def __init__(self, before: list[ModularPipelineBlocks], loop: Any) -> None:
        self.before = before
        self.loop = loop
        self.denoiser = BatchedDenoiser()
        loop.sub_blocks["denoiser"] = self.denoiser

    def step(self, components: Any, block_state: Any, i: int, t: torch.Tensor) -> Any:
        """One turn of the loop. diffusers' `loop_step` would log every cancellation as an error."""
        for block in self.loop.sub_blocks.values():
            _, block_state = block(components, block_state, i=i, t=t)
        return block_state


def make_tasks(texts: KeptTexts) -> dict[str, Task]:
    """Text to image, image to image and inpainting, which keep what they read in `texts`."""

    def before(encode: list[Any], *prepare: Any) -> list[Any]:
        return [TextEncoder(texts), *encode, StableDiffusionXLInputStep(), *prepare]

    return {
        "text-to-image": Task(
            before([], StableDiffusionXLBeforeDenoiseStep()), StableDiffusionXLDenoiseStep()
        ),
        "image-to-image": Task(
            before(
                [StableDiffusionXLVaeEncoderStep()],
                StableDiffusionXLImg2ImgSetTimestepsStep(),
                PrepareLatents(),
                StableDiffusionXLImg2ImgPrepareAdditionalConditioningStep(),
            ),
            StableDiffusionXLDenoiseStep(),
        ),
        "inpainting": Task(
            before(
                [InpaintVaeEncoder()],
                StableDiffusionXLImg2ImgSetTimestepsStep(),
                InpaintPrepareLatents(),
                StableDiffusionXLImg2ImgPrepareAdditionalConditioningStep(),
            ),
            StableDiffusionXLInpaintDenoiseStep(),
        ),
    }


def make_components(pipeline: Any) -> Any:
    """The components that the blocks read their models from: the pipeline's own, not copied."""
    components = Components(blocks=StableDiffusionXLAutoBlocks())
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae", "scheduler")
    components.update_components(**{name: pipeline.components[name] for name in names})
    components.register_to_config(
        force_zeros_for_empty_prompt=pipeline.config.get("force_zeros_for_empty_prompt", True),
        requires_aesthetics_score=pipeline.config.get("requires_aesthetics_score", False),
    )
    return components


def set_guidance(components: Any, scale: float, rescale: float) -> None:
    """Classifier-free guidance of that scale; off at 1 and below, and for networks that take it as input."""
    guider = components.guider
    on = scale > 1.0 and components.unet.config.time_cond_proj_dim is None
    guider.guidance_scale, guider.guidance_rescale = scale, rescale if on else 0.0
    guider.set_state(step=0, num_inference_steps=1, timestep=None)  # what the last request left there
    if on:
        guider.enable()
    else:
        guider.disable()
