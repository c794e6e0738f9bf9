"""Qwen-Image and Qwen-Image-Edit."""

from __future__ import annotations

from itertools import chain
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    QwenImageEditInpaintPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImagePipeline,
)
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import (
    CONDITION_IMAGE_SIZE,
    VAE_IMAGE_SIZE,
)
from PIL import Image

from distriray.denoise.pipelines.base import Commission, TokenCount, tokens_of
from distriray.denoise.pipelines.megapixels import ShowsMegapixels, size_shown
from distriray.denoise.pipelines.packed import PackedFlowMatching
from distriray.denoise.state import DenoiseState
from distriray.errors import InvalidRequest, UnsupportedModel
from distriray.parallel.networks.families.qwen_image import QwenImageControl
from distriray.parallel.networks.token_control import TokenControl

TEXT_TOKENS = 512


class QwenImage(PackedFlowMatching):
    """A pipeline that reads prompts with a language model; a branch has a call and a length of its own."""

    kinds: ClassVar[tuple[type, ...]] = (
        QwenImagePipeline,
        QwenImageImg2ImgPipeline,
        QwenImageInpaintPipeline,
    )
    parts: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder", "tokenizer")
    vae_kind = AutoencoderKLQwenImage
    vae_channels = "z_dim"
    max_clip_skip = 0
    unsaid = " "  # as the model's makers say
    control: ClassVar[type[TokenControl] | None] = QwenImageControl

    def check(self) -> None:
        super().check()
        if self.pipeline.transformer.config.get("guidance_embeds"):
            raise UnsupportedModel("a QwenImageTransformer2DModel with guidance_embeds")

    def tokens(self, text: str) -> list[TokenCount]:
        return [tokens_of(self._plain.tokenizer, text, TEXT_TOKENS)]

    def encode(self, commission: Commission) -> dict[str, Any]:
        options = {
            "device": self._transformer.device,
            "num_images_per_prompt": len(commission.generators),
            **self.reading(commission),
        }
        return {  # one prompt for all images has no padding, so there is no mask
            f"{branch}prompt_embeds": self.encode_prompt(prompt=prompt, **options)[0]
            for branch, prompt in self.prompts(commission).items()
        }

    def reading(self, commission: Commission) -> dict[str, Any]:
        """What its pipeline's `encode_prompt` is told besides the prompt."""
        return {"max_sequence_length": TEXT_TOKENS}

    def arguments(self, state: DenoiseState, branch: str) -> dict[str, Any]:
        drawn = 1, *self.grid(state.height, state.width)
        shapes = [drawn, *state.values.get("reference_shapes", ())]
        embeds = state.values[f"{branch}prompt_embeds"]
        return {"encoder_hidden_states": embeds, "img_shapes": [shapes] * state.batch}

    def guided(self, outputs: list[torch.Tensor], scale: float) -> torch.Tensor:
        """The same, keeping the length of each token's prediction, as the pipeline has it."""
        output = super().guided(outputs, scale)
        if len(outputs) == 1:
            return output
        lengths = (torch.norm(each, dim=-1, keepdim=True) for each in (outputs[0], output))
        return output * (next(lengths) / next(lengths))

    def control_picture(self, network: Any, pixels: torch.Tensor, commission: Commission) -> torch.Tensor:
        posterior = self.posterior(pixels[:, :, None])
        latents = torch.cat([posterior.sample(generator) for generator in commission.generators]).float()
        mean, std = self._of_latents(latents)
        return self.pack(((latents - mean) * (1.0 / std))[:, :, 0]).to(self._transformer.dtype)

    def _of_latents(self, latents: torch.Tensor) -> list[torch.Tensor]:
        """Mean and deviation of the VAE's latents, (1, channels, 1, 1, 1) each."""
        config = self._vae.config
        known = config.latents_mean, config.latents_std
        return [torch.tensor(numbers).view(1, -1, 1, 1, 1).to(latents) for numbers in known]

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        latents = latents.to(self._vae.dtype)[:, :, None]
        mean, std = self._of_latents(latents)
        return self.pictures(self._vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0][:, :, 0])


class QwenImageEdit(ShowsMegapixels, QwenImage):
    """Qwen-Image-Edit: its language model is shown the picture to edit too.

    Attributes:
        read_pixels: about how many it is shown.
    """

    kinds: ClassVar[tuple[type, ...]] = (QwenImageEditPipeline, QwenImageEditInpaintPipeline)
    fills = QwenImageEditInpaintPipeline
    control = None
    parts = (*QwenImage.parts, "processor")
    read_pixels: ClassVar[int] = VAE_IMAGE_SIZE

    def tokens(self, text: str) -> list[TokenCount]:
        return [tokens_of(self._plain.tokenizer, text, self._positions)]

    def encode(self, commission: Commission) -> dict[str, Any]:
        values = super().encode(commission)
        drawn = commission.width, commission.height
        longest = max(chain(drawn, *(size_shown(picture) for picture in commission.references)))
        most = self._positions - longest // self.token_side // 2  # a text's are beyond those of pictures
        for name, embeds in values.items():
            if embeds.shape[1] > most:
                field = name.removesuffix("_embeds")
                count = f"{field} and pictures come to {embeds.shape[1]} tokens"
                raise InvalidRequest(
                    f"{count}, and this model has positions for {most}; make it shorter", field
                )
        return values

    def masked(
        self, commission: Commission, dtype: torch.dtype, pictures: torch.Tensor, timesteps: torch.Tensor
    ) -> dict[str, Any]:
        values = super().masked(commission, dtype, pictures, timesteps)
        references = self.pack(values["image_latents"])
        shapes = [(1, *self.grid(commission.height, commission.width))]
        if further := commission.references[1:]:
            _, others, their = self.shown(commission, dtype, further, references)
            assert others is not None
            references, shapes = torch.cat([references, others], 1), shapes + their
        return {**values, "references": references, "reference_shapes": shapes}

    def reading(self, commission: Commission) -> dict[str, Any]:
        return {"image": self.taken(self.read(commission, self.read_pixels))}

    def taken(self, pictures: list[Any]) -> Any:
        (picture,) = pictures
        return picture

    @property
    def _positions(self) -> int:
        """Positions that the network has, of pictures on either side of 0."""
        return len(self._transformer.pos_embed.pos_freqs)


class QwenImageEditPlus(QwenImageEdit):
    """Qwen-Image-Edit of 2509 and later: several pictures, which the language model is shown smaller.

    Latents are the first one's, whose pipeline fills in masks here too: diffusers has none for these.
    """

    kinds = (QwenImageEditPlusPipeline,)
    read_pixels = CONDITION_IMAGE_SIZE

    def taken(self, pictures: list[Any]) -> Any:
        return pictures
