"""Krea 2."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Krea2Pipeline

from distriray.denoise.pipelines.base import Commission, TokenCount, tokens_in_chat
from distriray.denoise.pipelines.families.qwen_image import QwenImage
from distriray.denoise.state import DenoiseState
from distriray.errors import UnsupportedModel

TEXT_TOKENS = 512


class Krea2(QwenImage):
    """A pipeline with the VAE of Qwen-Image, that reads several layers of a language model, padded.

    The scale of guidance is one less than that of others: above 0 there is guidance, a call for each branch.
    """

    kinds = (Krea2Pipeline,)
    control = None
    unsaid = ""
    unguided = 0.0
    most_shifted = 6400

    def check(self) -> None:
        super().check()
        config = self.pipeline.config
        if config.patch_size != self.patch_size:
            raise UnsupportedModel(f"a Krea2Pipeline with patch_size {config.patch_size}; known is 2")

    def around(self, kind: type, parts: dict[str, Any]) -> Any:
        config = self.pipeline.config
        layers, distilled = config.text_encoder_select_layers, config.is_distilled
        return kind(**parts, scheduler=None, text_encoder_select_layers=layers, is_distilled=distilled)

    @property
    def guides(self) -> bool:
        return not self.pipeline.config.is_distilled

    def tokens(self, text: str) -> list[TokenCount]:
        pipeline = self._plain
        before, behind = (
            pipeline.prompt_template_encode_start_idx,
            pipeline.prompt_template_encode_num_suffix_tokens,
        )
        around = pipeline.prompt_template_encode_prefix
        return [tokens_in_chat(pipeline.tokenizer, text, around, TEXT_TOKENS + before - behind)]

    def shift(self, commission: Commission, tokens: int) -> float:
        # As the pipeline has it.
        return 1.15 if self.pipeline.config.is_distilled else super().shift(commission, tokens)

    def encode(self, commission: Commission) -> dict[str, Any]:
        values = {}
        for branch, prompt in self.prompts(commission).items():
            embeds, mask = self.encode_prompt(
                prompt,
                device=self._transformer.device,
                num_images_per_prompt=len(commission.generators),
                max_sequence_length=TEXT_TOKENS,
            )
            values[f"{branch}prompt_embeds"], values[f"{branch}prompt_mask"] = embeds, mask
        sides = self.grid(commission.height, commission.width)
        ids = self._plain.prepare_position_ids(embeds.shape[1], *sides, self._transformer.device)
        return {**values, "position_ids": ids}

    def time(self, state: DenoiseState, dtype: torch.dtype) -> torch.Tensor:
        times = state.scheduler.config.num_train_timesteps
        return (self.timestep(state, state.batch) / times).to(dtype)

    def arguments(self, state: DenoiseState, branch: str) -> dict[str, Any]:
        return {
            "encoder_hidden_states": state.values[f"{branch}prompt_embeds"],
            "encoder_attention_mask": state.values[f"{branch}prompt_mask"],
            "position_ids": state.values["position_ids"],
        }

    def guided(self, outputs: list[torch.Tensor], scale: float) -> torch.Tensor:
        output, *without = outputs
        return output + scale * (output - without[0]) if without else output

    def unpack(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        latents: torch.Tensor = self._plain._unpack_latents(tokens, height, width)
        return latents[:, :, 0]
