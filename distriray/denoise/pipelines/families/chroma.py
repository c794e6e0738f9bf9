"""Chroma."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from diffusers import ChromaImg2ImgPipeline, ChromaInpaintPipeline, ChromaPipeline

from distriray.denoise.pipelines.base import Commission, TokenCount, tokens_of
from distriray.denoise.pipelines.packed import PackedFlowMatching
from distriray.denoise.state import DenoiseState

TEXT_TOKENS = 512


class Chroma(PackedFlowMatching):
    """A pipeline with T5's tokens, of whose padding the first is seen; a branch has a call of its own."""

    kinds = (ChromaPipeline, ChromaImg2ImgPipeline, ChromaInpaintPipeline)
    parts = ("transformer", "vae", "text_encoder", "tokenizer")
    max_clip_skip = 0

    def tokens(self, text: str) -> list[TokenCount]:
        return [tokens_of(self._plain.tokenizer, text, TEXT_TOKENS)]

    def encode(self, commission: Commission) -> dict[str, Any]:
        images = len(commission.generators)
        embeds, ids, mask, negative_embeds, _, negative_mask = self.encode_prompt(
            prompt=commission.params.prompt,
            negative_prompt=commission.params.negative_prompt,
            do_classifier_free_guidance=self.is_guided(commission.guidance_scale),
            device=self._transformer.device,
            num_images_per_prompt=images,
            max_sequence_length=TEXT_TOKENS,
        )
        tokens = prod(self.grid(commission.height, commission.width))

        def whole(mask: torch.Tensor | None) -> torch.Tensor | None:
            whole: torch.Tensor | None = self._plain._prepare_attention_mask(
                images, tokens, embeds.dtype, mask
            )
            return whole

        return {
            "prompt_embeds": embeds,
            "attention_mask": whole(mask),
            "negative_prompt_embeds": negative_embeds,
            "negative_attention_mask": whole(negative_mask),
            "txt_ids": ids,
        }

    def arguments(self, state: DenoiseState, branch: str) -> dict[str, Any]:
        mask = state.values[f"{branch}attention_mask"]
        return {**super().arguments(state, branch), "attention_mask": mask}
