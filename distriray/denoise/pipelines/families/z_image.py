"""Z-Image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    ZImageControlNetModel,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImagePipeline,
)
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

from distriray.denoise.pipelines.base import Commission, PictureOf, TokenCount, tokens_in_chat
from distriray.denoise.pipelines.flow import BRANCHES, FlowMatching
from distriray.denoise.pipelines.masks import outside
from distriray.denoise.state import DenoiseState
from distriray.parallel.networks.families.z_image import ZImageControl

TEXT_TOKENS = 512


class ZImage(FlowMatching):
    """A pipeline that reads prompts with a language model, and keeps latents in float32.

    Both branches of guidance go through the network in one call, with texts of unequal length. The scale is
    diffusers' for it: what the prompt adds is added once more so many times, so 0 is none.
    """

    kinds = (ZImagePipeline, ZImageImg2ImgPipeline, ZImageInpaintPipeline)
    parts = ("transformer", "vae", "text_encoder", "tokenizer")
    max_clip_skip = 0
    patch_size = 2
    unguided = 0.0
    control = ZImageControl

    def tokens(self, text: str) -> list[TokenCount]:
        around = self._plain.tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        return [tokens_in_chat(self._plain.tokenizer, text, around, TEXT_TOKENS)]

    def sigmas(self, steps: int) -> Any:
        return get_default_z_image_sigmas(steps)

    def encode(self, commission: Commission) -> dict[str, Any]:
        embeds, negative_embeds = self.encode_prompt(
            prompt=commission.params.prompt,
            negative_prompt=commission.params.negative_prompt,
            do_classifier_free_guidance=self.is_guided(commission.guidance_scale),
            device=self._transformer.device,
            max_sequence_length=TEXT_TOKENS,
        )
        return {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": negative_embeds[0] if negative_embeds else None,
        }

    def take_control(self, network: Any) -> PictureOf:
        picture_of = super().take_control(network)
        ZImageControlNetModel.from_transformer(network, self._transformer)
        return picture_of

    def control_picture(self, network: Any, pixels: torch.Tensor, commission: Commission) -> torch.Tensor:
        """Latents, (1, channels, 1, rows, columns), and zeros in further channels, which are for masks."""
        latents = self.scaled(self.posterior(pixels).mode(), self._vae.config.shift_factor)
        further = network.control_in_dim - latents.shape[1]
        return F.pad(latents[:, :, None], (0, 0, 0, 0, 0, 0, 0, further))

    def noise(self, commission: Commission, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {"latents": self._plain.prepare_latents(*self._size(commission, torch.float32))}

    def noised(
        self, commission: Commission, dtype: torch.dtype, pictures: torch.Tensor, timesteps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        size = self._size(commission, dtype)
        return {"latents": self.pipeline_for(commission).prepare_latents(pictures, timesteps, *size)}

    def masked(
        self, commission: Commission, dtype: torch.dtype, pictures: torch.Tensor, timesteps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        pipeline, size = self.pipeline_for(commission), self._size(commission, dtype)
        latents, noise, image_latents = pipeline.prepare_latents(pictures, timesteps, *size)
        return {"latents": latents, **outside(pipeline, commission, noise, image_latents)}

    def step(self, state: DenoiseState) -> tuple[torch.Tensor, torch.Tensor]:
        branches = [BRANCHES[branch] for branch in self.branches_of(state)]
        texts = [state.values[f"{branch}prompt_embeds"] for branch in branches for _ in range(state.batch)]
        sample = state.latents.to(self._transformer.dtype).repeat(len(branches), 1, 1, 1)
        predicted = self.output_of(
            x=list(sample[:, :, None].unbind()),
            t=(1000 - self.timestep(state, len(texts))) / 1000,
            cap_feats=texts,
        )
        output = -torch.stack([each.float() for each in predicted]).squeeze(2)
        if len(branches) == 2:
            conditional, without = output.chunk(2)
            output = conditional + state.guidance_scale * (conditional - without)
        return self.advanced(state, output), output
