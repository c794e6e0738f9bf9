"""Qwen-Image 2.1."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from PIL import Image

from distriray.denoise.pipelines.base import Commission, Tokens, tokens_of
from distriray.denoise.pipelines.guidance import guided_calls
from distriray.denoise.pipelines.packed import PackedFlowMatching
from distriray.denoise.state import DenoiseState
from distriray.errors import InvalidRequest, UnsupportedModel

TEXT_TOKENS = 8191
"""Positions that its network has for a text; the last one is the image's."""
SLOT = 2
"""Rows and columns of the image's tokens that stand in one place of the text."""


class QwenImage21(PackedFlowMatching):
    """A pipeline that reads prompts with a language model, and draws pictures with transparency.

    A branch of guidance has a call and a text of its own. Texts look at themselves alone and know no step, so
    their keys and values are kept from step to step, and made anew wherever an image goes on: always by a
    call of their own, so that a step is the same whether it is the first there or not.
    """

    kinds = (QwenImage21Pipeline,)
    parts = ("transformer", "vae", "text_encoder", "processor")
    vae_kind = AutoencoderKLQwenImage21
    vae_channels = "z_dim"
    latents_per_input = 1
    patch_size = 1
    max_clip_skip = 0

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

    def tokens(self, text: str) -> list[Tokens]:
        return [tokens_of(self._plain.processor.tokenizer, text, TEXT_TOKENS)]

    def sigmas(self, steps: int) -> Any:
        own = self.pipeline.config.sample_sigmas
        return super().sigmas(steps) if own is None else own

    def encode(self, commission: Commission) -> dict[str, Any]:
        # As for Qwen-Image, guidance is against a space where nothing else is given.
        prompts = {"prompt": commission.params.prompt}
        if commission.guidance_scale > 1.0:
            prompts["negative_prompt"] = commission.params.negative_prompt or " "
        options = {"device": self._transformer.device, "num_images_per_prompt": len(commission.generators)}
        values = {}
        for name, prompt in prompts.items():
            embeds, _, _ = self._plain.encode_prompt(prompt, **options)  # one prompt has no padding: no mask
            if embeds.shape[1] > TEXT_TOKENS:
                raise InvalidRequest(
                    f"{name} comes to {embeds.shape[1]} tokens, and this model has positions for "
                    f"{TEXT_TOKENS}; make it shorter",
                    name,
                )
            values[f"{name}_embeds"] = embeds
        return values

    def noise(self, commission: Commission, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return self._prepared(commission, self._plain.prepare_latents(None, *self._size(commission, dtype)))

    def begin(self, state: DenoiseState) -> None:
        self._kept.clear()

    def step(self, state: DenoiseState) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, values = self.pack(state.latents), state.values
        timestep = self.timestep(state, state.batch).to(tokens.dtype) / 1000
        shape = state.latents.shape[2:]

        def call(branch: str) -> torch.Tensor:
            text = values[f"{branch}prompt_embeds"]
            kept = self._kept_of(branch, text)
            output: torch.Tensor = self._transformer(
                hidden_states=tokens,
                timestep=timestep,
                encoder_hidden_states=text,
                **_layout(text, *shape),
                kv_cache=kept,
                kv_cache_mode=None if kept is None else "cached",
                return_dict=False,
            )[0]
            return output[:, -tokens.shape[1] :]

        output = guided_calls(self.branches(state, call), state.guidance_scale)
        output = self.unpack(output, state.height, state.width)
        return self.advanced(state, output), output

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        config, latents = self._vae.config, latents.to(self._vae.dtype)[:, :, None]
        mean, std = (
            torch.tensor(numbers).view(1, -1, 1, 1, 1).to(latents)
            for numbers in (config.latents_mean, config.latents_std)
        )
        return self.pictures(self._vae.decode(latents * std + mean, return_dict=False)[0][:, :, 0])

    def _kept_of(self, branch: str, text: torch.Tensor) -> QwenImage21KVCache | None:
        """Keys and values of a branch's text; None where these change from step to step.

        Each rank makes them for itself, by the class's own forward, which no gang shares, of the smallest
        image that there is.
        """
        if not self._transformer.config.causal_condition:
            return None
        if branch not in self._kept:
            kept = QwenImage21KVCache(len(self._transformer.transformer_blocks))
            type(self._transformer).forward(
                self._transformer,
                hidden_states=text.new_zeros(len(text), SLOT * SLOT, self.latent_channels),
                timestep=text.new_zeros(len(text)),
                encoder_hidden_states=text,
                **_layout(text, SLOT, SLOT),
                kv_cache=kept,
                kv_cache_mode="extract",
                return_dict=False,
            )
            self._kept[branch] = kept
        return self._kept[branch]


def _layout(text: torch.Tensor, rows: int, columns: int) -> dict[str, Any]:
    """How the network is told where an image of so many tokens stands: behind the text."""
    length, slots = text.shape[1], rows * columns // SLOT**2
    return {
        "img_shapes": [[(1, rows, columns)]] * len(text),
        "img_mask": torch.arange(length + slots, device=text.device)[None] >= length,
    }
