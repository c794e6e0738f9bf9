"""Ovis-Image."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import OvisImagePipeline

from distriray.denoise.pipelines.base import Commission, TokenCount, tokens_in_chat
from distriray.denoise.pipelines.packed import PackedFlowMatching

TEXT_TOKENS = 256


class OvisImage(PackedFlowMatching):
    """A pipeline that reads prompts with a language model, padded; a branch has a call of its own."""

    kinds = (OvisImagePipeline,)
    parts: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder", "tokenizer")
    max_clip_skip = 0

    def tokens(self, text: str) -> list[TokenCount]:
        (around,) = self._plain._get_messages("")
        most = TEXT_TOKENS + self._plain.user_prompt_begin_id
        return [tokens_in_chat(self._plain.tokenizer, text, around, most)]

    def encode(self, commission: Commission) -> dict[str, Any]:
        values = {}
        for branch, prompt in self.prompts(commission).items():
            values[f"{branch}prompt_embeds"], values["txt_ids"] = self.embedded(
                prompt, len(commission.generators)
            )
        return values

    def embedded(self, prompt: str, images: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A prompt's embeddings, (images, tokens, channels), and the positions of any prompt's tokens."""
        embeds, _, ids, _ = self.encode_prompt(
            prompt=prompt,
            do_classifier_free_guidance=False,
            device=self._transformer.device,
            num_images_per_prompt=images,
            max_sequence_length=TEXT_TOKENS,
        )
        return embeds, ids
