"""FLUX.1, dev, schnell, Fill and Kontext."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import (
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
)
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL import Image
from torch import nn

from distriray.denoise.pipelines.base import Commission, PictureOf, TokenCount, tokens_of
from distriray.denoise.pipelines.image_prompts import embeds_of
from distriray.denoise.pipelines.masks import outside
from distriray.denoise.pipelines.packed import PackedFlowMatching
from distriray.denoise.pipelines.prompted import Prompted, PromptedFlux
from distriray.denoise.state import DenoiseState
from distriray.parallel import engine_of
from distriray.parallel.networks.families.flux import IMAGE_EMBEDS, FluxControl
from distriray.parallel.networks.token_control import TokenControl


class Flux(PackedFlowMatching):
    """A pipeline with CLIP's summary of a prompt and T5's tokens, and one branch of guidance.

    Where the network was distilled from guidance it takes the scale as an input.
    """

    kinds: ClassVar[tuple[type, ...]] = (FluxPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline)
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    max_clip_skip = 0
    guides = False
    control: ClassVar[type[TokenControl] | None] = FluxControl
    prompted: ClassVar[type[Prompted] | None] = PromptedFlux

    def tokens(self, text: str) -> list[TokenCount]:
        return [
            tokens_of(self._plain.tokenizer, text),
            tokens_of(self._plain.tokenizer_2, text, self._text_tokens),
        ]

    @property
    def _text_tokens(self) -> int:
        """Tokens of T5's text, as dev and schnell were trained."""
        return 512 if self._transformer.config.guidance_embeds else 256

    def encode(self, commission: Commission) -> dict[str, Any]:
        images, device = len(commission.generators), self._transformer.device
        takes_scale = self._transformer.config.guidance_embeds
        embeds, pooled, ids = self.encode_prompt(
            prompt=commission.params.prompt,
            prompt_2=commission.params.prompt_2,
            device=device,
            num_images_per_prompt=images,
            max_sequence_length=self._text_tokens,
        )
        scale = torch.full((images,), commission.guidance_scale, device=device) if takes_scale else None
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "txt_ids": ids, "guidance": scale}

    def take_control(self, network: Any) -> PictureOf:
        hint, side = network.input_hint_block, network.config.patch_size
        picture_of = super().take_control(network)
        if hint is None:
            return picture_of
        network.input_hint_block = None  # it sees the picture alone, and is the same in every step
        return partial(self._hinted, hint, side)

    def _hinted(
        self, hint: nn.Module, side: int, pixels: torch.Tensor, commission: Commission
    ) -> torch.Tensor:
        """A picture's tokens by layers of the ControlNet's own, of `side` by `side` of their output."""
        features = F.pixel_unshuffle(hint(pixels.to(self._transformer.device, self._transformer.dtype)), side)
        return features.flatten(2).transpose(1, 2)

    def control_picture(self, network: Any, pixels: torch.Tensor, commission: Commission) -> torch.Tensor:
        posterior = self.posterior(pixels)
        latents = torch.cat([posterior.sample(generator) for generator in commission.generators])
        return self.pack(self.scaled(latents, self._vae.config.shift_factor))

    def arguments(self, state: DenoiseState, branch: str) -> dict[str, Any]:
        pooled, scale = state.values["pooled_prompt_embeds"], state.values.get("guidance")
        given = {**super().arguments(state, branch), "pooled_projections": pooled, "guidance": scale}
        return {**given, **self._prompts(state.batch)}

    def _prompts(self, images: int) -> dict[str, Any]:
        """Arguments of the network for what the IP-Adapters in it attend to, if there are any."""
        if not self.image_prompts:
            return {}
        embeds = embeds_of(self.image_prompts, 1, images)
        names = tuple(prompt.name for prompt in self.image_prompts)
        return {
            "joint_attention_kwargs": {IMAGE_EMBEDS: embeds},
            **({} if engine_of(self._transformer) is None else {"image_prompts": names}),
        }


class FluxFill(Flux):
    """FLUX.1 Fill: dev, whose network takes the mask and what it leaves of the picture in each token."""

    kinds = (FluxFillPipeline,)
    control = None
    prompted = None

    @property
    def input_channels(self) -> int:
        """Latents, as many of the picture, and the pixels of the mask in a token."""
        side: int = self.patch_size * self.pipeline.vae_scale_factor
        return 2 * super().input_channels + side**2

    def masked(
        self, commission: Commission, dtype: torch.dtype, pictures: torch.Tensor, timesteps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        pipeline, size = self.pipeline_for(commission), (commission.height, commission.width)
        values = self.noised(commission, dtype, pictures, timesteps)
        mask = pipeline.mask_processor.preprocess(commission.mask_image, *size)
        images, channels, *_, device, generators = self._size(commission, dtype)
        rest = (pictures * (1 - mask)).to(device, dtype)
        mask, rest = pipeline.prepare_mask_latents(
            mask, rest, images, channels, 1, *size, dtype, device, generators
        )
        return {**values, "masked_image": torch.cat([rest, mask], 2)}

    def beside(self, state: DenoiseState, tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat([tokens, state.values["masked_image"]], 2)


class FluxKontext(Flux):
    """FLUX.1 Kontext: dev, that is shown a picture to edit beside the one that it draws."""

    kinds = (FluxKontextPipeline, FluxKontextInpaintPipeline)
    fills = FluxKontextInpaintPipeline
    control = None

    def noise(self, commission: Commission, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        shown = self._shown(commission.references[0]) if commission.references else None
        prepared = self._plain.prepare_latents(shown, *self._size(commission, dtype))
        tokens, references, ids, references_ids = prepared
        values = self._prepared(commission, (tokens, ids))
        if references is None:
            return values
        return {**values, "img_ids": torch.cat([ids, references_ids]), "references": references}

    def masked(
        self, commission: Commission, dtype: torch.dtype, pictures: torch.Tensor, timesteps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        pipeline, size = self.pipeline_for(commission), (commission.height, commission.width)
        tokens, kept, _, ids, kept_ids, _, noise = pipeline.prepare_latents(
            pictures, timesteps, *self._size(commission, dtype)
        )
        values = self._prepared(commission, (tokens, torch.cat([ids, kept_ids])))
        apart = outside(pipeline, commission, self.unpack(noise, *size), self.unpack(kept, *size))
        return {**values, "references": kept, **apart}

    def _shown(self, reference: Image.Image) -> torch.Tensor:
        """The pixels that the model is shown, (1, 3, height, width), in the nearest shape that it knows."""
        processor = self._plain.image_processor
        height, width = processor.get_default_height_width(reference)
        _, wide, high = min((abs(width / height - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        high, wide = (side // self.token_side * self.token_side for side in (high, wide))
        shown: torch.Tensor = processor.preprocess(processor.resize(reference, high, wide), high, wide)
        return shown
