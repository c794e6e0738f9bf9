"""FLUX.2, dev and klein."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLFlux2,
    Flux2KleinInpaintPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
)
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input
from PIL import Image

from distriray.denoise.pipelines.base import Commission, TokenCount, tokens_in_chat
from distriray.denoise.pipelines.flow import FlowMatching
from distriray.denoise.pipelines.guidance import guided_calls
from distriray.denoise.pipelines.masks import outside
from distriray.denoise.state import DenoiseState
from distriray.errors import UnsupportedModel
from distriray.references import MOST_PIXELS

TEXT_TOKENS = 512


class TokensInRows(FlowMatching):
    """Common parts of FLUX.2 and 3, and of ERNIE-Image.

    A state's latents are tokens of 2x2 latents of the VAE, normalized, in rows. Padding of the text is
    attended to, as in the pipelines.
    """

    parts = ("transformer", "vae", "text_encoder", "tokenizer")
    latents_per_input = 4
    patch_size = 2
    vae_kind = AutoencoderKLFlux2
    max_clip_skip = 0

    @property
    def batch_norm_eps(self) -> float:
        """What is added to the variance of the VAE's latents."""
        eps: float = self._vae.config.batch_norm_eps
        return eps

    def sigmas(self, steps: int) -> Any:
        return np.linspace(1.0, 1 / steps, steps)

    def rows(self, tokens: torch.Tensor, commission: Commission) -> torch.Tensor:
        """Tokens, (batch, tokens, channels), in the rows of the picture: (batch, channels, rows, columns)."""
        return tokens.transpose(1, 2).unflatten(2, self.grid(commission.height, commission.width))

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        norm = self._vae.bn
        mean, variance = (each.view(1, -1, 1, 1) for each in (norm.running_mean, norm.running_var))
        deviation = torch.sqrt(variance + self.batch_norm_eps).to(latents)
        latents = Flux2Pipeline._unpatchify_latents(latents * deviation + mean.to(latents))
        return self.pictures(self._vae.decode(latents.to(self._vae.dtype), return_dict=False)[0])


class _Flux2(TokensInRows):
    """Common parts of dev and klein, whose references are tokens after the picture's own.

    Latents are alike, and klein's pipeline fills in masks of dev's too: diffusers has none for dev.
    """

    fills = Flux2KleinInpaintPipeline

    def shift(self, commission: Commission, tokens: int) -> float:
        return compute_empirical_mu(tokens, commission.num_inference_steps)

    def embedded(self, prompt: str, images: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A prompt's embeddings, (images, tokens, channels), and the tokens' positions."""
        embeds, ids = self.encode_prompt(
            prompt=prompt,
            device=self._transformer.device,
            num_images_per_prompt=images,
            max_sequence_length=TEXT_TOKENS,
        )
        return embeds, ids

    def noise(self, commission: Commission, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        tokens, ids = self._plain.prepare_latents(*self._size(commission, dtype))
        latents = self.rows(tokens, commission)
        if not commission.references:
            return {"latents": latents, "img_ids": ids}
        shown, shown_ids = self._plain.prepare_image_latents(
            images=[self._shown(picture) for picture in commission.references],
            batch_size=len(tokens),
            generator=None,
            device=tokens.device,
            dtype=self._vae.dtype,
        )
        return {"latents": latents, "img_ids": torch.cat([ids, shown_ids], 1), "references": shown}

    def masked(
        self, commission: Commission, dtype: torch.dtype, pictures: torch.Tensor, timesteps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        pipeline = self.pipeline_for(commission)
        tokens, noise, _, kept, ids = pipeline.prepare_latents(
            pictures, timesteps, *self._size(commission, dtype)
        )
        shown, shown_ids = pipeline.prepare_image_latents(
            images=[kept, *(self._shown(picture) for picture in commission.references[1:])],
            batch_size=len(tokens),
            generator=None,
            device=tokens.device,
            dtype=dtype,
        )
        latents, noise = self.rows(tokens, commission), self.rows(noise, commission)
        return {
            "latents": latents,
            "img_ids": torch.cat([ids, shown_ids], 1),
            "references": shown,
            **outside(pipeline, commission, noise, kept, mode="bilinear"),
        }

    def _shown(self, reference: Image.Image) -> torch.Tensor:
        """The pixels of a reference that the model is shown, (1, 3, height, width), from -1 to 1."""
        processor = self._plain.image_processor
        reference = processor._resize_if_exceeds_area(reference, MOST_PIXELS)
        width, height = (side // self.token_side * self.token_side for side in reference.size)
        shown: torch.Tensor = processor.preprocess(reference, height=height, width=width, resize_mode="crop")
        return shown

    def step(self, state: DenoiseState) -> tuple[torch.Tensor, torch.Tensor]:
        latents = state.latents
        own = self._plain._pack_latents(latents)
        tokens = self.with_references(state, own).to(self._transformer.dtype)
        timestep = self.timestep(state, state.batch).to(latents.dtype) / 1000
        outputs = self.outputs_of(state, lambda branch: self.arguments(state, branch, tokens, timestep))
        output = guided_calls(outputs, state.guidance_scale)[:, : own.shape[1]]
        output = output.transpose(1, 2).unflatten(2, latents.shape[2:])
        return self.advanced(state, output), output

    def arguments(
        self, state: DenoiseState, branch: str, tokens: torch.Tensor, timestep: torch.Tensor
    ) -> dict[str, Any]:
        """Arguments of the network, for the branch whose values begin with that."""
        values = state.values
        return {
            "hidden_states": tokens,
            "timestep": timestep,
            "guidance": values.get("guidance"),
            "encoder_hidden_states": values[f"{branch}prompt_embeds"],
            "txt_ids": values[f"{branch}txt_ids"],
            "img_ids": values["img_ids"],
        }


class Flux2(_Flux2):
    """FLUX.2 dev, whose network was distilled from guidance and takes the scale as an input."""

    kinds = (Flux2Pipeline,)
    guides = False

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self._plain.system_message = pipeline.system_message

    def tokens(self, text: str) -> list[TokenCount]:
        processor, system = self._plain.tokenizer, self._plain.system_message
        around = processor.apply_chat_template(format_input([""], system)[0], tokenize=False)
        tokenizer = getattr(processor, "tokenizer", processor)  # a processor takes pictures too
        return [tokens_in_chat(tokenizer, text, around, TEXT_TOKENS)]

    def encode(self, commission: Commission) -> dict[str, Any]:
        images = len(commission.generators)
        embeds, ids = self.embedded(commission.params.prompt, images)
        scale = torch.full((images,), commission.guidance_scale, device=embeds.device)
        return {"prompt_embeds": embeds, "txt_ids": ids, "guidance": scale}


class Flux2Klein(_Flux2):
    """FLUX.2 klein: a call of the network for each branch of guidance, or distilled to do without."""

    kinds = (Flux2KleinPipeline, Flux2KleinInpaintPipeline)

    def check(self) -> None:
        super().check()
        if self.pipeline.transformer.config.guidance_embeds:
            raise UnsupportedModel("a Flux2Transformer2DModel of klein with guidance_embeds")

    @property
    def guides(self) -> bool:
        return not self.pipeline.config.is_distilled

    def tokens(self, text: str) -> list[TokenCount]:
        around = self._plain.tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        return [tokens_in_chat(self._plain.tokenizer, text, around, TEXT_TOKENS)]

    def encode(self, commission: Commission) -> dict[str, Any]:
        images, values = len(commission.generators), {}
        for branch, prompt in self.prompts(commission).items():
            values[f"{branch}prompt_embeds"], values[f"{branch}txt_ids"] = self.embedded(prompt, images)
        return values
