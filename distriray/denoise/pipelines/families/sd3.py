"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)

from distriray.denoise.pipelines.base import Commission, PictureOf, TokenCount, tokens_of
from distriray.denoise.pipelines.flow import GuidedInOneCall
from distriray.denoise.pipelines.masks import outside
from distriray.errors import InvalidRequest
from distriray.parallel.networks.families.sd3 import SD3Control

T5_TOKENS = 256


class StableDiffusion3(GuidedInOneCall):
    """A pipeline with two CLIP encoders, and T5 or none."""

    kinds = (StableDiffusion3Pipeline, StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline)
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    optional_parts = ("text_encoder_3", "tokenizer_3")
    texts = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}
    control = SD3Control

    @property
    def max_clip_skip(self) -> int:
        encoders = self._plain.text_encoder, self._plain.text_encoder_2
        return min(encoder.config.num_hidden_layers for encoder in encoders) - 1

    def tokens(self, text: str) -> list[TokenCount]:
        tokens = [tokens_of(each, text) for each in (self._plain.tokenizer, self._plain.tokenizer_2)]
        if self._plain.tokenizer_3 is not None:
            tokens.append(tokens_of(self._plain.tokenizer_3, text, T5_TOKENS))
        return tokens

    @property
    def patch_size(self) -> int:
        size: int = self._transformer.config.patch_size
        return size

    def prepare(self, commission: Commission) -> dict[str, Any]:
        self._check_positions(commission, self._transformer, "this model")
        return super().prepare(commission)

    def _check_positions(self, commission: Commission, network: Any, whose: str) -> None:
        """Raise InvalidRequest where a row or column of tokens is longer than there are positions for."""
        positions = network.pos_embed.pos_embed_max_size
        for name, side in (("height", commission.height), ("width", commission.width)):
            if positions is not None and side > (most := positions * self.token_side):
                raise InvalidRequest(f"{name} {side} is above {most}, the largest that {whose} has", name)

    def encode(self, commission: Commission) -> dict[str, Any]:
        params, is_guided = commission.params, self.is_guided(commission.guidance_scale)
        embeds, negative_embeds, pooled, negative_pooled = self.encode_prompt(
            prompt=params.prompt,
            prompt_2=params.prompt_2,
            prompt_3=params.prompt_3,
            device=self._transformer.device,
            num_images_per_prompt=len(commission.generators),
            do_classifier_free_guidance=is_guided,
            negative_prompt=params.negative_prompt,
            negative_prompt_2=params.negative_prompt_2,
            negative_prompt_3=params.negative_prompt_3,
            clip_skip=params.clip_skip,
            max_sequence_length=T5_TOKENS,
        )
        return {
            "prompt_embeds": torch.cat([negative_embeds, embeds]) if is_guided else embeds,
            "pooled_prompt_embeds": torch.cat([negative_pooled, pooled]) if is_guided else pooled,
        }

    def take_control(self, network: Any) -> PictureOf:
        picture_of = super().take_control(network)
        if network.pos_embed is None:  # it was trained on what the model's first layer gives
            positions = network._get_pos_embed_from_transformer(self._transformer)
            network.pos_embed = positions.to(self._transformer.device, self._transformer.dtype)
        return picture_of

    def control_picture(self, network: Any, pixels: torch.Tensor, commission: Commission) -> torch.Tensor:
        """The most likely latents of a picture.

        diffusers draws them by torch's default generator, so that a seed would not decide the picture.
        """
        self._check_positions(commission, network, "a ControlNet of this request")
        unshifted = network.config.force_zeros_for_pooled_projection
        shift = 0.0 if unshifted else self._vae.config.shift_factor
        return self.scaled(self.posterior(pixels).mode(), shift)

    def noise(self, commission: Commission, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        config, device, generators = self._transformer.config, self._transformer.device, commission.generators
        size = (config.in_channels, commission.height, commission.width)
        return {"latents": self._plain.prepare_latents(len(generators), *size, dtype, device, generators)}

    def noised(
        self, commission: Commission, dtype: torch.dtype, pictures: torch.Tensor, timesteps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        device, generators = self._transformer.device, commission.generators
        latents = self.pipeline_for(commission).prepare_latents(
            pictures, timesteps, len(pictures), 1, dtype, device, generators
        )
        return {"latents": latents}

    def masked(
        self, commission: Commission, dtype: torch.dtype, pictures: torch.Tensor, timesteps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        pipeline = self.pipeline_for(commission)
        latents, noise, image_latents = pipeline.prepare_latents(
            *self._size(commission, dtype),
            image=pictures,
            timestep=timesteps,
            is_strength_max=commission.strength == 1.0,
            return_noise=True,
            return_image_latents=True,
        )
        return {"latents": latents, **outside(pipeline, commission, noise, image_latents)}
