"""HunyuanImage 2.1, and the one that was distilled."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import AdaptiveProjectedMixGuidance, AutoencoderKLHunyuanImage, HunyuanImagePipeline
from diffusers.guiders.adaptive_projected_guidance_mix import MomentumBuffer
from PIL import Image

from distriray.denoise.pipelines.base import Commission, TokenCount, tokens_in_chat
from distriray.denoise.pipelines.flow import FlowMatching
from distriray.denoise.state import DenoiseState
from distriray.errors import UnsupportedModel

OF_ANY, OF_QUOTING = "guider", "ocr_guider"
"""What the pipeline calls its guider, and that of prompts that quote what is to be read in the picture."""
_TEXTS = "prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2"
_INPUTS = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "encoder_hidden_states_2",
    "encoder_attention_mask_2",
)
"""What the network calls them."""


class HunyuanImage(FlowMatching):
    """A pipeline that reads prompts with a language model, and letter by letter what they quote.

    A branch of guidance has a call of its own. What guides has a memory of what the prompt added in the steps
    before, which a state keeps among its values. The network of the one that was distilled takes the scale,
    and the timestep that a step goes to.
    """

    kinds = (HunyuanImagePipeline,)
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    optional_parts = (OF_ANY, OF_QUOTING)
    vae_kind = AutoencoderKLHunyuanImage
    max_clip_skip = 0

    def check(self) -> None:
        super().check()
        components, what = self.pipeline.components, type(self.pipeline).__name__
        if components["vae"].config.scaling_factor is None:
            raise UnsupportedModel(f"{what} whose VAE has no scaling_factor; 1.0 is none")
        guiders = {name: components[name] for name in self.optional_parts if components[name] is not None}
        if guiders and components["transformer"].config.guidance_embeds:
            raise UnsupportedModel(
                f"{what} with {' and '.join(guiders)} around a network that takes the scale of guidance"
            )
        if OF_QUOTING in guiders and OF_ANY not in guiders:
            raise UnsupportedModel(f"{what} with {OF_QUOTING}, without {OF_ANY}")
        for name, guider in guiders.items():
            if type(guider) is not AdaptiveProjectedMixGuidance:
                known = AdaptiveProjectedMixGuidance.__name__
                raise UnsupportedModel(f"{what} with {type(guider).__name__} as {name}; known is {known}")
            config = guider.config
            if (config.enabled, config.start, config.stop) != (True, 0.0, 1.0):
                raise UnsupportedModel(
                    f"{what} whose {name} is off, or not of all steps; requests say that by guidance_scale "
                    "and guidance_end"
                )
            if config.guidance_scale != guiders[OF_ANY].config.guidance_scale or config.guidance_rescale:
                raise UnsupportedModel(
                    f"{what} whose {name} rescales, or has another scale than its {OF_ANY}; requests say "
                    "that by guidance_rescale and guidance_scale"
                )

    @property
    def patch_size(self) -> int:
        rows: int = self.pipeline.transformer.config.patch_size[0]
        return rows

    @property
    def guides(self) -> bool:
        return self._plain.guider is not None

    def tokens(self, text: str) -> list[TokenCount]:
        """Of the language model alone: what is quoted is a part of what it reads."""
        around, _, _ = self._plain.prompt_template_encode.partition("{}")
        most = self._plain.tokenizer_max_length + self._plain.prompt_template_encode_start_idx
        return [tokens_in_chat(self._plain.tokenizer, text, around, most)]

    def sigmas(self, steps: int) -> Any:
        return np.linspace(1.0, 0.0, steps + 1)[:-1]

    def encode(self, commission: Commission) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for branch, prompt in self.prompts(commission).items():
            read = self.encode_prompt(
                prompt=prompt,
                device=self._transformer.device,
                num_images_per_prompt=len(commission.generators),
            )
            for name, tensor in zip(_TEXTS, read, strict=True):
                embeds = tensor.is_floating_point()
                values[f"{branch}{name}"] = tensor.to(self._transformer.dtype) if embeds else tensor
        quotes = bool(values["prompt_embeds_2"].any()) and self._plain.ocr_guider is not None
        return {**values, "guider": OF_QUOTING if quotes else OF_ANY}

    def noise(self, commission: Commission, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {"latents": self._plain.prepare_latents(*self._size(commission, dtype))}

    def step(self, state: DenoiseState) -> tuple[torch.Tensor, torch.Tensor]:
        values, latents, config = state.values, state.latents, self._transformer.config
        timestep, others = self.timestep(state, state.batch), dict[str, torch.Tensor]()
        if config.use_meanflow:
            others["timestep_r"] = self.following_timestep(state, state.batch).to(latents.dtype)
        if config.guidance_embeds:
            scale = torch.full_like(timestep, state.guidance_scale, dtype=self._transformer.dtype)
            others["guidance"] = scale * 1000.0

        def arguments(branch: str) -> dict[str, Any]:
            texts = {name: values[f"{branch}{text}"] for name, text in zip(_INPUTS, _TEXTS, strict=True)}
            return {"hidden_states": latents, "timestep": timestep.to(latents.dtype), **texts, **others}

        output = self._guided(state, self.outputs_of(state, arguments))
        return self.advanced(state, output), output

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        latents = latents.to(self._vae.dtype) / self._vae.config.scaling_factor
        return self.pictures(self._vae.decode(latents, return_dict=False)[0])

    def _guided(self, state: DenoiseState, outputs: list[torch.Tensor]) -> torch.Tensor:
        """The outputs of [conditional, unconditional] by the pipeline's guider; the first where it is alone.

        It has a scale of its own for its later steps, and in these the request's says only that they are
        guided.
        """
        if len(outputs) == 1:
            return outputs[0]
        guider = getattr(self._plain, state.values["guider"]).new(
            guidance_scale=state.guidance_scale, guidance_rescale=state.guidance_rescale
        )
        guider.set_state(state.step, state.num_steps, state.values["timesteps"][state.step])
        if guider.adaptive_projected_guidance_momentum is not None:
            guider.momentum_buffer = MomentumBuffer(guider.adaptive_projected_guidance_momentum)
            guider.momentum_buffer.running_average = state.values.get("momentum", 0)
        output: torch.Tensor = guider.forward(*outputs).pred
        if guider.momentum_buffer is not None:
            state.values["momentum"] = guider.momentum_buffer.running_average
        return output
