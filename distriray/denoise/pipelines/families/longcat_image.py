"""LongCat-Image and LongCat-Image-Edit."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import FluxKontextInpaintPipeline, LongCatImageEditPipeline, LongCatImagePipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.longcat_image.pipeline_longcat_image import split_quotation

from distriray.denoise.pipelines.base import Commission, TokenCount
from distriray.denoise.pipelines.families.ovis_image import OvisImage
from distriray.denoise.pipelines.masks import outside
from distriray.errors import InvalidRequest

NARROWEST = 200
"""How many times as long as the shorter side the longer one may be that its language model is shown."""


class _OnItsNetwork:
    """A pipeline on its network's device: it goes by a text encoder's otherwise, which may be elsewhere."""

    transformer: Any

    @property
    def device(self) -> torch.device:
        device: torch.device = self.transformer.device
        return device


class _Reading(_OnItsNetwork, LongCatImagePipeline):
    """LongCat-Image's, which encodes prompts."""


class _Editing(_OnItsNetwork, LongCatImageEditPipeline):
    """LongCat-Image-Edit's, with what pipelines have that fill in masks: its latents are those of FLUX.1."""

    get_timesteps = FluxKontextInpaintPipeline.get_timesteps

    @property
    def mask_processor(self) -> VaeImageProcessor:
        return VaeImageProcessor(
            vae_scale_factor=2 * self.vae_scale_factor,
            do_normalize=False,
            do_binarize=True,
            do_convert_grayscale=True,
        )


class _LongCat(OvisImage):
    """A pipeline that reads what a prompt quotes letter by letter."""

    def tokens(self, text: str) -> list[TokenCount]:
        tokenizer = self._plain.tokenizer
        pieces = (piece for part, quoted in split_quotation(text) for piece in (part if quoted else [part]))
        given = sum(len(tokenizer(piece, add_special_tokens=False).input_ids) for piece in pieces)
        return [TokenCount(given, min(given, self._plain.tokenizer_max_length))]


class LongCatImage(_LongCat):
    """LongCat-Image.

    Prompts are read as they are: the pipeline's text encoder is not asked to write them anew, since it draws
    from torch's global random numbers.
    """

    kinds = (LongCatImagePipeline,)
    optional_parts = ("text_processor",)

    def around(self, kind: type, parts: dict[str, Any]) -> Any:
        return _Reading(**parts, scheduler=None)

    def embedded(self, prompt: str, images: int) -> tuple[torch.Tensor, torch.Tensor]:
        embeds, ids = self.encode_prompt(prompt, images)
        return embeds, ids

    def guided(self, outputs: list[torch.Tensor], scale: float) -> torch.Tensor:
        """The same, where no token's prediction becomes longer than the prompt's, as the pipeline has it."""
        output = super().guided(outputs, scale)
        if len(outputs) == 1:
            return output
        own, guided = (torch.norm(each, dim=-1, keepdim=True) for each in (outputs[0], output))
        return output * (own / (guided + 1e-8)).clamp(min=0.0, max=1.0)


class LongCatImageEdit(_LongCat):
    """LongCat-Image-Edit: its language model is shown the picture to edit too, at half of its sides.

    The network is shown it in the size that is drawn, whatever its own. So what lies outside of a mask is in
    one place for it, as with FLUX.1 Kontext, whose blend is taken: diffusers has no pipeline for masks here.
    """

    kinds = (LongCatImageEditPipeline,)
    parts = (*OvisImage.parts, "text_processor")
    fills: ClassVar[type | None] = _Editing

    def around(self, kind: type, parts: dict[str, Any]) -> Any:
        return _Editing(**parts, scheduler=None)

    def encode(self, commission: Commission) -> dict[str, Any]:
        resize, (height, width) = self._plain.image_processor.resize, (commission.height, commission.width)
        (picture,) = commission.references
        if max(height, width) > NARROWEST * min(height, width):
            longer = "height" if height > width else "width"
            shape = f"{width}x{height} pixels have sides of more than 1 to {NARROWEST}"
            raise InvalidRequest(f"{shape}, which this model cannot read its picture in", longer)
        read = resize(resize(picture, height, width), height // 2, width // 2)
        values: dict[str, Any] = {}
        for branch, prompt in self.prompts(commission).items():
            ((given, taken),) = self.tokens(prompt)
            if given > taken:  # of which the pipeline means to warn, and fails
                count = f"{branch}prompt has {given} tokens, and this model reads {taken}"
                raise InvalidRequest(f"{count}; make it shorter", f"{branch}prompt")
            values[f"{branch}prompt_embeds"], values["txt_ids"] = self.encode_prompt(
                prompt, read, len(commission.generators)
            )
        return values

    def prepare(self, commission: Commission) -> dict[str, Any]:
        values = super().prepare(commission)
        ids, text = values["img_ids"], values["prompt_embeds"].shape[1]
        return {**values, "img_ids": torch.cat([ids[:, :1], ids[:, 1:] + text], 1)}

    def noise(self, commission: Commission, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The same, with places that begin at 0: `prepare` knows where the text ends, and moves them."""
        (picture,), processor = commission.references, self._plain.image_processor
        *size, device, generators = self._size(commission, dtype)
        high, wide = commission.height, commission.width
        shown = processor.preprocess(processor.resize(picture, high, wide), high, wide)
        tokens, references, *ids = self._plain.prepare_latents(shown, *size, 0, device, generators)
        return {**self._prepared(commission, (tokens, torch.cat(ids))), "references": references}

    def masked(
        self, commission: Commission, dtype: torch.dtype, pictures: torch.Tensor, timesteps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        values = self.noise(commission, dtype)
        noise = values["latents"]
        kept = self.unpack(values["references"], commission.height, commission.width)
        latents = commission.scheduler.scale_noise(kept, timesteps, noise)
        apart = outside(self.pipeline_for(commission), commission, noise, kept)
        return {**values, "latents": latents, **apart}
