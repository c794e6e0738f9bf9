"""Ovis-Image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import OvisImagePipeline

from distriray.denoise.pipelines.base import Commission, Tokens, tokens_in_chat
from distriray.denoise.pipelines.guidance import guided_calls
from distriray.denoise.pipelines.packed import PackedFlowMatching
from distriray.denoise.state import DenoiseState

TEXT_TOKENS = 256


class OvisImage(PackedFlowMatching):
    """A pipeline that reads prompts with a language model, padded; a branch has a call of its own."""

    kinds = (OvisImagePipeline,)
    parts = ("transformer", "vae", "text_encoder", "tokenizer")
    max_clip_skip = 0

    def tokens(self, text: str) -> list[Tokens]:
        (around,) = self._plain._get_messages("")
        most = TEXT_TOKENS + self._plain.user_prompt_begin_id
        return [tokens_in_chat(self._plain.tokenizer, text, around, most)]

    def encode(self, commission: Commission) -> dict[str, Any]:
        values = {}
        for branch, prompt in self.prompts(commission).items():
            embeds, _, ids, _ = self._plain.encode_prompt(
                prompt=prompt,
                do_classifier_free_guidance=False,
                device=self._transformer.device,
                num_images_per_prompt=len(commission.generators),
                max_sequence_length=TEXT_TOKENS,
            )
            values[f"{branch}prompt_embeds"], values["txt_ids"] = embeds, ids
        return values

    def step(self, state: DenoiseState) -> tuple[torch.Tensor, torch.Tensor]:
        values, tokens = state.values, self.pack(state.latents)
        timestep = self.timestep(state, state.batch).to(tokens.dtype) / 1000

        def arguments(branch: str) -> dict[str, Any]:
            return {
                "hidden_states": tokens,
                "timestep": timestep,
                "encoder_hidden_states": values[f"{branch}prompt_embeds"],
                "txt_ids": values["txt_ids"],
                "img_ids": values["img_ids"],
            }

        output = self.guided(self.outputs_of(state, arguments), state.guidance_scale)
        output = self.unpack(output, state.height, state.width)
        return self.advanced(state, output), output

    def guided(self, outputs: list[torch.Tensor], scale: float) -> torch.Tensor:
        """The outputs of [conditional, unconditional], (batch, tokens, channels), by the scale."""
        return guided_calls(outputs, scale)
