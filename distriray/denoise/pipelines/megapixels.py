"""Pictures to edit that a model is shown as a megapixel each, whatever their size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
from PIL import Image

from distriray.denoise.pipelines.base import Commission
from distriray.denoise.pipelines.packed import PackedFlowMatching
from distriray.references import MOST_PIXELS


class ShowsMegapixels(PackedFlowMatching):
    """A pipeline whose network has such pictures beside the one that is drawn, each as a grid of tokens.

    Attributes:
        mode: of the pictures: RGB, or RGBA with transparency.
    """

    mode: ClassVar[str] = "RGB"

    def noise(self, commission: Commission, dtype: torch.dtype) -> dict[str, Any]:
        tokens, references, shapes = self.shown(commission, dtype, commission.references)
        values = self._prepared(commission, tokens)
        if references is None:
            return values
        return {**values, "references": references, "reference_shapes": shapes}

    def shown(
        self,
        commission: Commission,
        dtype: torch.dtype,
        pictures: Sequence[Image.Image],
        latents: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[tuple[int, int, int]]]:
        """Tokens of noise, or of `latents`, those of the pictures beside them, and the grid of each."""
        sizes = [size_shown(picture) for picture in pictures]
        process = self._plain.image_processor.preprocess
        shown = [
            process(picture.convert(self.mode), high, wide)[:, :, None]
            for picture, (wide, high) in zip(pictures, sizes, strict=True)
        ]
        size = self._size(commission, dtype)
        tokens, references = self._plain.prepare_latents(self.taken(shown), *size, latents)
        return tokens, references, [(1, *self.grid(high, wide)) for wide, high in sizes]

    def read(self, commission: Commission, pixels: int = MOST_PIXELS) -> list[Image.Image]:
        """The pictures as the language model is shown them, of about so many pixels."""
        sizes = (size_shown(picture, pixels) for picture in commission.references)
        resize = self._plain.image_processor.resize
        return [
            resize(picture.convert(self.mode), high, wide)
            for picture, (wide, high) in zip(commission.references, sizes, strict=True)
        ]

    def taken(self, pictures: list[Any]) -> Any:
        """Pictures, or their pixels, as the pipeline's methods take them."""
        return pictures or None


def size_shown(picture: Image.Image, pixels: int = MOST_PIXELS) -> tuple[int, int]:
    """Width and height, in a picture's proportions, of about so many pixels."""
    width, height = calculate_dimensions(pixels, picture.width / picture.height)
    return width, height
