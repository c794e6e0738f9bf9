"""FLUX.1, dev and schnell."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline

from distriray.denoise.pipelines.base import Commission, Tokens, tokens_of
from distriray.denoise.pipelines.flow import FlowMatching
from distriray.denoise.state import DenoiseState


class Flux(FlowMatching):
    """A pipeline with CLIP's summary of a prompt and T5's tokens, and one branch of guidance.

    Where the network was distilled from guidance it takes the scale as an input. A token is 2x2 latents,
    which are packed for the network alone.
    """

    kinds = (FluxPipeline, FluxImg2ImgPipeline)
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    latents_per_input = 4
    patch_size = 2
    max_clip_skip = 0
    guides = False

    def tokens(self, text: str) -> list[Tokens]:
        """Of T5: CLIP gives a summary alone."""
        tokenizer = self._plain.tokenizer_2
        return [tokens_of(tokenizer, self._plain.maybe_convert_prompt(text, tokenizer), self._t5_tokens)]

    @property
    def _t5_tokens(self) -> int:
        """As many as each was trained with."""
        return 512 if self._transformer.config.guidance_embeds else 256

    def encode(self, commission: Commission) -> dict[str, Any]:
        images, device = len(commission.generators), self._transformer.device
        takes_scale = self._transformer.config.guidance_embeds
        embeds, pooled, ids = self._plain.encode_prompt(
            prompt=commission.params.prompt,
            prompt_2=None,
            device=device,
            num_images_per_prompt=images,
            max_sequence_length=self._t5_tokens,
        )
        scale = torch.full((images,), commission.guidance_scale, device=device) if takes_scale else None
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "txt_ids": ids, "guidance": scale}

    def sigmas(self, steps: int) -> Any:
        return np.linspace(1.0, 1 / steps, steps)

    def noise(self, commission: Commission, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return self._unpacked(commission, *self._plain.prepare_latents(*self._size(commission, dtype)))

    def noised(
        self, commission: Commission, dtype: torch.dtype, pictures: torch.Tensor, timesteps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        size = self._size(commission, dtype)
        return self._unpacked(commission, *self._img2img.prepare_latents(pictures, timesteps, *size))

    def step(self, state: DenoiseState) -> tuple[torch.Tensor, torch.Tensor]:
        values, latents = state.values, state.latents
        output = self._transformer(
            hidden_states=self._plain._pack_latents(latents, *latents.shape),
            timestep=self.timestep(state, state.batch).to(latents.dtype) / 1000,
            guidance=values.get("guidance"),
            encoder_hidden_states=values["prompt_embeds"],
            pooled_projections=values["pooled_prompt_embeds"],
            txt_ids=values["txt_ids"],
            img_ids=values["img_ids"],
            return_dict=False,
        )[0]
        output = self._unpack(output, state.height, state.width)
        return self.advanced(state, output), output

    def _size(self, commission: Commission, dtype: torch.dtype) -> tuple[Any, ...]:
        """What diffusers' methods that prepare latents take of it, in their order."""
        images, channels = len(commission.generators), self._vae.config.latent_channels
        size = commission.height, commission.width
        return images, channels, *size, dtype, self._transformer.device, commission.generators

    def _unpacked(
        self, commission: Commission, packed: torch.Tensor, ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`latents`, and where each of their tokens lies."""
        return {"latents": self._unpack(packed, commission.height, commission.width), "img_ids": ids}

    def _unpack(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(batch, tokens, channels) as (batch, channels, rows, columns) of a picture of that size."""
        latents: torch.Tensor = self._plain._unpack_latents(
            tokens, height, width, self._plain.vae_scale_factor
        )
        return latents
