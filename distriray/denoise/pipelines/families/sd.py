"""Stable Diffusion 1.x and 2.x, by the methods of diffusers' ordinary pipelines."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from distriray.denoise.pipelines.base import Commission, TokenCount, check_pixels, tokens_of
from distriray.denoise.pipelines.control import UNetSteps, controlled
from distriray.denoise.pipelines.guidance import ConditionalHalf, guided
from distriray.denoise.pipelines.masks import keep_outside
from distriray.denoise.state import DenoiseState
from distriray.errors import UnsupportedModel

PARTS = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
FURTHER_INPUTS = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")


class StableDiffusion(UNetSteps):
    """A pipeline with one text encoder; what it predicts, noise or velocity, is the scheduler's to know.

    A state keeps `prompt_embeds` of both guidance branches as one batch [unconditional, conditional], which
    goes through the network in one call.
    """

    kinds = (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline)

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        # Around the same models, but for each request's scheduler, which the user's pipeline never sees.
        parts = {name: pipeline.components[name] for name in PARTS}
        plain, img2img, inpaint = (
            kind(**parts, unet=None, scheduler=None, requires_safety_checker=False) for kind in self.kinds
        )
        self._by_task = {"text-to-image": plain, "image-to-image": img2img, "inpainting": inpaint}
        self._unet, self._vae, self._plain = pipeline.unet, pipeline.vae, plain
        self._conditional = ConditionalHalf()

    def check(self) -> None:
        components, what = self.pipeline.components, type(self.pipeline).__name__
        for name in ("vae", "text_encoder", "tokenizer", "unet"):
            if components[name] is None:
                raise UnsupportedModel(f"{what} without {name} cannot be denoised step by step")
        if isinstance(components["vae"], AsymmetricAutoencoderKL):
            raise UnsupportedModel("AsymmetricAutoencoderKL decodes with a picture and its mask")
        config, latents = components["unet"].config, components["vae"].config.latent_channels
        for name in FURTHER_INPUTS:
            if config.get(name) is not None:
                raise UnsupportedModel(f"the U-Net's {name} {config[name]!r}, which Stable Diffusion has not")
        if config.in_channels not in (latents, 2 * latents + 1):
            raise UnsupportedModel(
                f"a U-Net of {config.in_channels} channels; with latents of {latents} there are those of "
                f"{latents}, and of {2 * latents + 1} for a mask and a picture"
            )

    @property
    def needs_image(self) -> bool:
        """Whether the network takes a picture and its mask besides the latents."""
        takes: int = self._unet.config.in_channels
        return takes != self._vae.config.latent_channels

    @property
    def guides(self) -> bool:
        return self._unet.config.time_cond_proj_dim is None

    @property
    def max_clip_skip(self) -> int:
        layers: int = self._plain.text_encoder.config.num_hidden_layers
        return layers - 1

    def tokens(self, text: str) -> list[TokenCount]:
        tokenizer = self._plain.tokenizer
        return [tokens_of(tokenizer, self._plain.maybe_convert_prompt(text, tokenizer))]

    def prepare(self, commission: Commission) -> dict[str, Any]:
        params, images = commission.params, len(commission.generators)
        pipeline, device = self._by_task[commission.task], self._unet.device
        pipeline.scheduler = commission.scheduler
        is_guided = self.is_guided(commission.guidance_scale)
        prompt: dict[str, Any] = {"prompt": params.prompt}
        if params.clip_skip:
            prompt = {"prompt": None, "prompt_embeds": self._skip_layers(params.prompt, params.clip_skip)}
        embeds, negative_embeds = self.kept_texts.of(
            pipeline.encode_prompt,
            **prompt,
            device=device,
            num_images_per_prompt=images,
            do_classifier_free_guidance=is_guided,
            negative_prompt=params.negative_prompt,
        )
        prompt_embeds = torch.cat([negative_embeds, embeds]) if is_guided else embeds
        commission.scheduler.set_timesteps(commission.num_inference_steps, device=device)
        begin = {"text-to-image": self._noise, "image-to-image": self._on_picture, "inpainting": self._masked}
        values = begin[commission.task](pipeline, commission, embeds.dtype)
        return {
            "prompt_embeds": prompt_embeds,
            "timestep_cond": self._guidance_embeds(commission.guidance_scale, images, embeds.dtype),
            **values,
        }

    def begin(self, state: DenoiseState) -> None:
        self._conditional.forget()

    def step(self, state: DenoiseState) -> tuple[torch.Tensor, torch.Tensor]:
        pipeline, scheduler, values = self._by_task[state.task], state.scheduler, state.values
        pipeline.scheduler = scheduler
        timestep, latents = values["timesteps"][state.step], state.latents
        has_branches = self.is_guided(state.guidance_scale)
        is_guided = has_branches and not state.guidance_over
        branches = 2 if is_guided else 1
        embeds = values["prompt_embeds"]
        if has_branches and not is_guided:
            embeds = self._conditional.of(state, "prompt_embeds")
        sample = scheduler.scale_model_input(torch.cat([latents] * branches), timestep)
        if self.needs_image:
            fixed = torch.cat([values["mask"], values["masked_image_latents"]], dim=1)
            sample = torch.cat([sample, torch.cat([fixed] * branches)], dim=1)
        output = controlled(
            self._unet,
            self.controls,
            self.image_prompts,
            branches,
            sample,
            timestep,
            encoder_hidden_states=embeds,
            timestep_cond=values.get("timestep_cond"),
            return_dict=False,
        )[0]
        if is_guided:
            output = guided(output, state)
        options = pipeline.prepare_extra_step_kwargs(state.generators, 0.0)
        latents = scheduler.step(output, timestep, latents, **options, return_dict=False)[0]
        return keep_outside(state, latents), output

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Where the pipeline has a safety checker, pictures that it finds offensive come out black."""
        plain, vae = self._plain, self._vae
        decoded = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        check_pixels(decoded)
        pictures, offends = plain.run_safety_checker(decoded, decoded.device, plain.text_encoder.dtype)
        shown = [True] * len(latents) if offends is None else [not each for each in offends]
        images: list[Image.Image] = plain.image_processor.postprocess(
            pictures, output_type="pil", do_denormalize=shown
        )
        return images

    def _skip_layers(self, prompt: str, skip: int) -> torch.Tensor:
        """Embeddings of a prompt by an encoder without its last `skip` layers, (1, tokens, channels).

        diffusers' own `clip_skip` looks for the last norm where only transformers before 5 has it.
        """
        tokenizer, encoder = self._plain.tokenizer, self._plain.text_encoder
        tokens = tokenizer(
            self._plain.maybe_convert_prompt(prompt, tokenizer),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(self._unet.device)
        masked = getattr(encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask if masked else None
        layers = encoder(tokens.input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
        embeds: torch.Tensor = getattr(encoder, "text_model", encoder).final_layer_norm(layers[-(skip + 1)])
        return embeds

    def _guidance_embeds(self, scale: float, images: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The guidance scale as an input of networks that were distilled with it."""
        width = self._unet.config.time_cond_proj_dim
        if width is None:
            return None
        scales = torch.tensor(scale - 1).repeat(images)
        embeds: torch.Tensor = self._plain.get_guidance_scale_embedding(scales, embedding_dim=width)
        return embeds.to(self._unet.device, dtype)

    def _noise(self, pipeline: Any, commission: Commission, dtype: torch.dtype) -> dict[str, Any]:
        images, channels = len(commission.generators), self._unet.config.in_channels
        size = (commission.height, commission.width)
        latents = pipeline.prepare_latents(
            images, channels, *size, dtype, self._unet.device, commission.generators
        )
        return {"latents": latents, "timesteps": commission.scheduler.timesteps}

    def _on_picture(self, pipeline: Any, commission: Commission, dtype: torch.dtype) -> dict[str, Any]:
        assert commission.image is not None
        picture = pipeline.image_processor.preprocess(commission.image, commission.height, commission.width)
        timesteps = self._timesteps(pipeline, commission)
        images, device = len(commission.generators), self._unet.device
        first = timesteps[:1].repeat(images)
        latents = pipeline.prepare_latents(picture, first, images, 1, dtype, device, commission.generators)
        return {"latents": latents, "timesteps": timesteps}

    def _masked(self, pipeline: Any, commission: Commission, dtype: torch.dtype) -> dict[str, Any]:
        """Draws all that the pipeline draws, also where the network takes no masked picture."""
        assert commission.image is not None
        generators, device = commission.generators, self._unet.device
        size, images = (commission.height, commission.width), len(generators)
        timesteps = self._timesteps(pipeline, commission)
        # One each, so that every image is drawn with its own generator.
        picture = pipeline.image_processor.preprocess([commission.image] * images, *size)
        mask = pipeline.mask_processor.preprocess([commission.mask_image] * images, *size)
        channels = self._vae.config.latent_channels
        latents, noise, *image_latents = pipeline.prepare_latents(
            images,
            channels,
            *size,
            dtype,
            device,
            generators,
            image=picture,
            timestep=timesteps[:1].repeat(images),
            is_strength_max=commission.strength == 1.0,
            return_noise=True,
            return_image_latents=not self.needs_image,
        )
        mask, masked_image_latents = pipeline.prepare_mask_latents(
            mask, picture * (mask < 0.5), images, *size, dtype, device, generators, False
        )
        values = {"latents": latents, "timesteps": timesteps, "mask": mask}
        if self.needs_image:
            return {**values, "masked_image_latents": masked_image_latents}
        return {**values, "noise": noise, "image_latents": image_latents[0]}

    def _timesteps(self, pipeline: Any, commission: Commission) -> torch.Tensor:
        """The last timesteps, those of the commission's strength."""
        steps = commission.num_inference_steps
        timesteps: torch.Tensor
        timesteps, _ = pipeline.get_timesteps(steps, commission.strength, self._unet.device)
        commission.check_timesteps(timesteps)
        return timesteps
