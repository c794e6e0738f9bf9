"""ERNIE-Image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ErnieImagePipeline
from diffusers.utils.torch_utils import randn_tensor

from distriray.denoise.pipelines.base import Commission, TokenCount, tokens_of
from distriray.denoise.pipelines.families.flux2 import TokensInRows
from distriray.denoise.pipelines.flow import GuidedInOneCall
from distriray.denoise.state import DenoiseState
from distriray.errors import UnsupportedModel


class ErnieImage(GuidedInOneCall, TokensInRows):
    """A pipeline that reads prompts with a language model, and has latents as FLUX.2 has tokens.

    Texts are padded to the longest. What the pipeline may have to write prompts anew is not asked: it draws
    from torch's global random numbers, so that a seed would not say what is drawn.
    """

    kinds = (ErnieImagePipeline,)
    latents_per_input = 4
    patch_size = 1  # of what the pipeline calls its VAE's latents: 2x2 of them
    texts = {"text_bth": "prompt_embeds", "text_lens": "text_lens"}

    def check(self) -> None:
        super().check()
        patch = self.pipeline.transformer.config.patch_size
        if patch != 1:
            raise UnsupportedModel(f"an ErnieImageTransformer2DModel with patch_size {patch}; known is 1")

    def tokens(self, text: str) -> list[TokenCount]:
        return [tokens_of(self._plain.tokenizer, text)]

    @property
    def batch_norm_eps(self) -> float:
        return 1e-5  # as its pipeline has it, whatever the VAE's configuration says

    def sigmas(self, steps: int) -> Any:
        return torch.linspace(1.0, 0.0, steps + 1)[:-1]

    def encode(self, commission: Commission) -> dict[str, Any]:
        device, texts = self._transformer.device, []
        for prompt in reversed(self.prompts(commission).values()):
            texts += self.encode_prompt(prompt, device, len(commission.generators))
        width = self._transformer.config.text_in_dim
        embeds, lengths = self._plain._pad_text(texts, device, self._transformer.dtype, width)
        return {"prompt_embeds": embeds, "text_lens": lengths}

    def noise(self, commission: Commission, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        sides = self.grid(commission.height, commission.width)
        size = len(commission.generators), self._transformer.config.in_channels, *sides
        device = self._transformer.device
        return {"latents": randn_tensor(size, commission.generators, device, dtype)}

    def timestep(self, state: DenoiseState, batch: int) -> torch.Tensor:
        return super().timestep(state, batch).to(state.latents.dtype)
