"""LongCat-Image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import LongCatImagePipeline
from diffusers.pipelines.longcat_image.pipeline_longcat_image import split_quotation

from distriray.denoise.pipelines.base import TokenCount
from distriray.denoise.pipelines.families.ovis_image import OvisImage


class _Reading(LongCatImagePipeline):
    """The pipeline on its network's device: it goes by a text encoder's otherwise, which may be elsewhere."""

    @property
    def device(self) -> torch.device:
        device: torch.device = self.transformer.device
        return device


class LongCatImage(OvisImage):
    """A pipeline that reads what a prompt quotes letter by letter.

    Prompts are read as they are: the pipeline's text encoder is not asked to write them anew, since it draws
    from torch's global random numbers.
    """

    kinds = (LongCatImagePipeline,)
    optional_parts = ("text_processor",)

    def around(self, kind: type, parts: dict[str, Any]) -> Any:
        return _Reading(**parts, scheduler=None)

    def tokens(self, text: str) -> list[TokenCount]:
        tokenizer = self._plain.tokenizer
        pieces = (piece for part, quoted in split_quotation(text) for piece in (part if quoted else [part]))
        given = sum(len(tokenizer(piece, add_special_tokens=False).input_ids) for piece in pieces)
        return [TokenCount(given, min(given, self._plain.tokenizer_max_length))]

    def embedded(self, prompt: str, images: int) -> tuple[torch.Tensor, torch.Tensor]:
        embeds, ids = self._plain.encode_prompt(prompt, images)
        return embeds, ids

    def guided(self, outputs: list[torch.Tensor], scale: float) -> torch.Tensor:
        """The same, where no token's prediction becomes longer than the prompt's, as the pipeline has it."""
        output = super().guided(outputs, scale)
        if len(outputs) == 1:
            return output
        own, guided = (torch.norm(each, dim=-1, keepdim=True) for each in (outputs[0], output))
        return output * (own / (guided + 1e-8)).clamp(min=0.0, max=1.0)
