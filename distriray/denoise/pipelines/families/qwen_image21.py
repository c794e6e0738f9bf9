"""Qwen-Image 2.1."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from PIL import Image

from distriray.denoise.pipelines.base import Commission, TokenCount, tokens_of
from distriray.denoise.pipelines.guidance import guided_calls
from distriray.denoise.pipelines.megapixels import ShowsMegapixels
from distriray.denoise.state import DenoiseState
from distriray.errors import InvalidRequest, UnsupportedModel

TEXT_TOKENS = 8191
"""Positions that its network has for a text; the last one is the image's."""
SLOT = 2
"""Rows and columns of the image's tokens that stand in one place of the text."""


class QwenImage21(ShowsMegapixels):
    """A pipeline that reads prompts with a language model, and draws pictures with transparency.

    A branch of guidance has a call and a text of its own, in which pictures to edit have their places. Both
    look at themselves alone and know no step, so their keys and values are kept from step to step, and made
    anew wherever an image goes on: always by a call of their own, so that a step is the same whether it is
    the first there or not.
    """

    kinds = (QwenImage21Pipeline,)
    parts = ("transformer", "vae", "text_encoder", "processor")
    vae_kind = AutoencoderKLQwenImage21
    vae_channels = "z_dim"
    latents_per_input = 1
    patch_size = 1
    max_clip_skip = 0
    mode = "RGBA"
    unsaid = " "  # as for Qwen-Image

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self._kept: dict[str, QwenImage21KVCache] = {}

    def check(self) -> None:
        super().check()
        vae, network = self.pipeline.vae.config, self.pipeline.transformer.config
        scale = 2 ** (len(vae.dim_mult) - 1)
        if scale != self.pipeline.vae_scale_factor:
            raise UnsupportedModel(
                f"an AutoencoderKLQwenImage21 of {scale} pixels to a row of latents; its pipeline takes "
                f"{self.pipeline.vae_scale_factor}"
            )
        if network.patch_size != 1:
            raise UnsupportedModel(f"a QwenImage21Transformer2DModel with patch_size {network.patch_size}")

    def tokens(self, text: str) -> list[TokenCount]:
        return [tokens_of(self._plain.processor.tokenizer, text, TEXT_TOKENS)]

    def sigmas(self, steps: int) -> Any:
        own = self.pipeline.config.sample_sigmas
        return super().sigmas(steps) if own is None else own

    def encode(self, commission: Commission) -> dict[str, Any]:
        shown = self.read(commission)
        options = {
            "image": self.taken(shown),
            "device": self._transformer.device,
            "num_images_per_prompt": len(commission.generators),
        }
        tokens = prod(self.grid(commission.height, commission.width))
        values: dict[str, Any] = {}
        for branch, prompt in self.prompts(commission).items():
            # One prompt has no padding: no mask.
            embeds, _, slots = self.encode_prompt(prompt, **options)
            taken = embeds.shape[1] - int(slots.sum())
            taken += sum(max(picture.size) // self.token_side for picture in shown)
            if taken > TEXT_TOKENS:
                count = f"{branch}prompt comes to {taken} tokens"
                raise InvalidRequest(
                    f"{count}, and this model has positions for {TEXT_TOKENS}; make it shorter",
                    f"{branch}prompt",
                )
            drawn = slots.new_ones(len(slots), tokens // SLOT**2)  # behind the text
            values[f"{branch}prompt_embeds"] = embeds
            values[f"{branch}prompt_image_mask"] = torch.cat([slots, drawn], 1)
        return values

    def begin(self, state: DenoiseState) -> None:
        self._kept.clear()

    def step(self, state: DenoiseState) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, values = self.pack(state.latents), state.values
        timestep, shape = self.time(state, tokens.dtype), (1, *state.latents.shape[2:])

        def arguments(branch: str) -> dict[str, Any]:
            kept = self._kept_of(branch, state)
            return {
                **_inputs(branch, state, tokens, shape),
                "img_mask": values[f"{branch}prompt_image_mask"],
                "timestep": timestep,
                "kv_cache": kept,
                "kv_cache_mode": None if kept is None else "cached",
            }

        outputs = [output[:, -tokens.shape[1] :] for output in self.outputs_of(state, arguments)]
        output = self.unpack(guided_calls(outputs, state.guidance_scale), state.height, state.width)
        return self.advanced(state, output), output

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        config, latents = self._vae.config, latents.to(self._vae.dtype)[:, :, None]
        mean, std = (
            torch.tensor(numbers).view(1, -1, 1, 1, 1).to(latents)
            for numbers in (config.latents_mean, config.latents_std)
        )
        return self.pictures(self._vae.decode(latents * std + mean, return_dict=False)[0][:, :, 0])

    def _kept_of(self, branch: str, state: DenoiseState) -> QwenImage21KVCache | None:
        """Keys and values of a branch's text and pictures; None where these change from step to step.

        Each rank makes them for itself, by the class's own forward, which no gang shares, of the smallest
        image that there is.
        """
        if not self._transformer.config.causal_condition:
            return None
        if branch not in self._kept:
            kept = QwenImage21KVCache(len(self._transformer.transformer_blocks))
            smallest = state.latents.new_zeros(state.batch, SLOT * SLOT, self.latent_channels)
            inputs = _inputs(branch, state, smallest, (1, SLOT, SLOT))
            mask = state.values[f"{branch}prompt_image_mask"]
            type(self._transformer).forward(
                self._transformer,
                **inputs,
                img_mask=mask[:, : inputs["encoder_hidden_states"].shape[1] + 1],
                timestep=smallest.new_zeros(state.batch),
                kv_cache=kept,
                kv_cache_mode="extract",
                return_dict=False,
            )
            self._kept[branch] = kept
        return self._kept[branch]


def _inputs(branch: str, state: DenoiseState, tokens: torch.Tensor, shape: tuple[int, ...]) -> dict[str, Any]:
    """What the network is given of an image's tokens and of a branch's text and pictures, before them."""
    values = state.values
    pictures = [] if "references" not in values else [values["references"]]
    return {
        "hidden_states": torch.cat([*pictures, tokens], 1),
        "encoder_hidden_states": values[f"{branch}prompt_embeds"],
        "img_shapes": [[*values.get("reference_shapes", ()), shape]] * len(tokens),
    }
