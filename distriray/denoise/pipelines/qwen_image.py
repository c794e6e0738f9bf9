"""Qwen-Image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageImg2ImgPipeline, QwenImagePipeline
from PIL import Image

from distriray.denoise.pipelines.base import Commission, Tokens, tokens_of
from distriray.denoise.pipelines.guidance import guided_calls
from distriray.denoise.pipelines.packed import PackedFlowMatching
from distriray.denoise.state import DenoiseState
from distriray.errors import UnsupportedModel

TEXT_TOKENS = 512


class QwenImage(PackedFlowMatching):
    """A pipeline that reads prompts with a language model; a branch has a call and a length of its own."""

    kinds = (QwenImagePipeline, QwenImageImg2ImgPipeline)
    parts = ("transformer", "vae", "text_encoder", "tokenizer")
    vae_kind = AutoencoderKLQwenImage
    vae_channels = "z_dim"
    max_clip_skip = 0

    def check(self) -> None:
        super().check()
        if self.pipeline.transformer.config.guidance_embeds:
            raise UnsupportedModel("a QwenImageTransformer2DModel with guidance_embeds")

    def tokens(self, text: str) -> list[Tokens]:
        return [tokens_of(self._plain.tokenizer, text, TEXT_TOKENS)]

    def encode(self, commission: Commission) -> dict[str, Any]:
        # Guidance is against a space where nothing else is given, as the model's makers say.
        prompts = {"prompt_embeds": commission.params.prompt}
        if commission.guidance_scale > 1.0:
            prompts["negative_prompt_embeds"] = commission.params.negative_prompt or " "
        options = {
            "device": self._transformer.device,
            "num_images_per_prompt": len(commission.generators),
            "max_sequence_length": TEXT_TOKENS,
        }
        return {  # one prompt for all images has no padding, so there is no mask
            name: self._plain.encode_prompt(prompt=prompt, **options)[0] for name, prompt in prompts.items()
        }

    def step(self, state: DenoiseState) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, values = self.pack(state.latents), state.values
        timestep = self.timestep(state, state.batch).to(tokens.dtype) / 1000
        shape = (1, *(side // self.patch_size for side in state.latents.shape[2:]))

        def call(branch: str) -> torch.Tensor:
            output: torch.Tensor = self._transformer(
                hidden_states=tokens,
                timestep=timestep,
                encoder_hidden_states=values[f"{branch}prompt_embeds"],
                img_shapes=[[shape]] * state.batch,
                return_dict=False,
            )[0]
            return output

        outputs = self.branches(state, call)
        output = self.unpack(_guided(outputs, state.guidance_scale), state.height, state.width)
        return self.advanced(state, output), output

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        config, latents = self._vae.config, latents.to(self._vae.dtype)[:, :, None]
        mean, std = (
            torch.tensor(numbers).view(1, -1, 1, 1, 1).to(latents)
            for numbers in (config.latents_mean, config.latents_std)
        )
        return self.pictures(self._vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0][:, :, 0])


def _guided(outputs: list[torch.Tensor], scale: float) -> torch.Tensor:
    """Guidance that keeps the length of each token's prediction, as the pipeline has it.

    Args:
        outputs: of the prompt and, with guidance, of what is not to be seen; (batch, tokens, channels).
    """
    output = guided_calls(outputs, scale)
    if len(outputs) == 1:
        return output
    lengths = (torch.norm(each, dim=-1, keepdim=True) for each in (outputs[0], output))
    return output * (next(lengths) / next(lengths))
