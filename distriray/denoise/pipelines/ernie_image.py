"""ERNIE-Image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ErnieImagePipeline
from diffusers.utils.torch_utils import randn_tensor

from distriray.denoise.pipelines.base import Commission, Tokens, tokens_of
from distriray.denoise.pipelines.flux2 import TokensInRows
from distriray.denoise.pipelines.guidance import ConditionalHalf, guided
from distriray.denoise.state import DenoiseState
from distriray.errors import UnsupportedModel


class ErnieImage(TokensInRows):
    """A pipeline that reads prompts with a language model, and has latents as FLUX.2 has tokens.

    A state keeps the texts of both guidance branches as one batch [unconditional, conditional], padded to the
    longest, which goes through the network in one call. What the pipeline may have to write prompts anew is
    not asked: it draws from torch's global random numbers, so that a seed would not say what is drawn.
    """

    kinds = (ErnieImagePipeline,)
    latents_per_input = 4
    patch_size = 1  # of what the pipeline calls its VAE's latents: 2x2 of them

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self._conditional = ConditionalHalf()

    def check(self) -> None:
        super().check()
        patch = self.pipeline.transformer.config.patch_size
        if patch != 1:
            raise UnsupportedModel(f"an ErnieImageTransformer2DModel with patch_size {patch}; known is 1")

    def tokens(self, text: str) -> list[Tokens]:
        return [tokens_of(self._plain.tokenizer, text)]

    @property
    def batch_norm_eps(self) -> float:
        return 1e-5  # as its pipeline has it, whatever the VAE's configuration says

    def sigmas(self, steps: int) -> Any:
        return torch.linspace(1.0, 0.0, steps + 1)[:-1]

    def encode(self, commission: Commission) -> dict[str, Any]:
        device, texts = self._transformer.device, []
        for prompt in reversed(self.prompts(commission).values()):
            texts += self._plain.encode_prompt(prompt, device, len(commission.generators))
        width = self._transformer.config.text_in_dim
        embeds, lengths = self._plain._pad_text(texts, device, self._transformer.dtype, width)
        return {"prompt_embeds": embeds, "text_lens": lengths}

    def noise(self, commission: Commission, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        sides = commission.height // self.token_side, commission.width // self.token_side
        size = len(commission.generators), self._transformer.config.in_channels, *sides
        device = self._transformer.device
        return {"latents": randn_tensor(size, commission.generators, device, dtype)}

    def begin(self, state: DenoiseState) -> None:
        self._conditional.forget()

    def step(self, state: DenoiseState) -> tuple[torch.Tensor, torch.Tensor]:
        has_branches = state.guidance_scale > 1.0
        is_guided = has_branches and not state.guidance_over
        texts = {name: state.values[name] for name in ("prompt_embeds", "text_lens")}
        if has_branches and not is_guided:
            texts = {name: self._conditional.of(state, name) for name in texts}
        sample = torch.cat([state.latents] * 2) if is_guided else state.latents
        output = self._transformer(
            hidden_states=sample,
            timestep=self.timestep(state, len(sample)).to(sample.dtype),
            text_bth=texts["prompt_embeds"],
            text_lens=texts["text_lens"],
            return_dict=False,
        )[0]
        if is_guided:
            output = guided(output, state)
        return self.advanced(state, output), output
