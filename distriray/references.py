"""References: the pictures that a model which edits draws after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod, sqrt

from pydantic import BaseModel, ConfigDict

from distriray.errors import InvalidRequest
from distriray.picture import CarriedPicture, Picture

MOST_PIXELS = 2**20
"""What a model is shown of a reference: one with more is made smaller."""

LOOKED_AT = 0.15
"""Share of a step that a picture of the drawn one's size adds where it is only looked at, by the arithmetic
of Qwen-Image 2.1 at a megapixel."""

LEAST_SIDE, LONGEST = 64, 8
"""The shortest side of a reference, in pixels, and how many times as long the other one may be."""


class Reference(BaseModel):
    """A picture that the prompt speaks of."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    image: CarriedPicture
    """The picture, as a `data:` URL. With more than 1024x1024 pixels, it is shown to the model smaller."""


def shown_size(size: tuple[int, int], unit: int, most: int = MOST_PIXELS) -> tuple[int, int]:
    """The size of a reference as it is shown: multiples of `unit`, `most` in all; everything is in pixels."""
    width, height = size
    scale = min(1.0, sqrt(most / (width * height)))
    width, height = (max(unit, int(side * scale) // unit * unit) for side in size)
    return width, height


def megapixel_size(size: tuple[int, int], unit: int, rounds_up: bool = False) -> tuple[int, int]:
    """The size of about a megapixel in the shape of `size`: multiples of `unit`; everything is in pixels.

    Args:
        rounds_up: sides are no shorter than that, as diffusers' LongCatImageEditPipeline has it.
    """
    width, height = size
    if rounds_up:
        exact = sqrt(MOST_PIXELS * (width / height))
        return ceil(exact / unit) * unit, ceil(exact / (width / height) / unit) * unit
    wide, high = (
        max(1, round(sqrt(MOST_PIXELS * ratio) / unit)) * unit for ratio in (width / height, height / width)
    )
    return wide, high


@dataclass(frozen=True)
class Editing:
    """A model's terms for what it edits.

    Attributes:
        max_references: how many pictures at once.
        sole_pixels: what it is shown of a picture that it edits alone.
        megapixel_unit: pixels that sides are multiples of, where it is shown a megapixel of small ones too
            and draws as much if no size is named; None where they stay small.
        rounds_up: of sides of that megapixel.
        as_drawn: it edits one picture, which it is shown in the size that is drawn.
        needs_references: it draws nothing from text alone.
        keeps: what it is shown goes through it once, and every step looks at keys and values that are kept.
        sees_transparency: what is transparent is shown so, not white.
    """

    max_references: int
    sole_pixels: int = MOST_PIXELS
    megapixel_unit: int | None = None
    rounds_up: bool = False
    as_drawn: bool = False
    needs_references: bool = False
    keeps: bool = False
    sees_transparency: bool = False

    def drawn_size(self, size: tuple[int, int], unit: int) -> tuple[int, int]:
        """The (width, height) that is drawn, by default, where the first picture has `size`."""
        if self.megapixel_unit is not None:
            return megapixel_size(size, self.megapixel_unit, self.rounds_up)
        return shown_size(size, unit)

    def shown_pixels(
        self, references: Sequence[Reference], unit: int, drawn: int, masked: bool = False
    ) -> int:
        """Pixels that the model is shown of them in every step; sizes are multiples of `unit`.

        Where they are kept, as many as cost what looking at them does.

        Args:
            drawn: pixels of the picture that is drawn.
            masked: a mask is filled in: the first is shown in that size.
        """
        if not references:
            return 0
        if masked or self.as_drawn:
            return drawn + self.shown_pixels(references[1:], unit, drawn)
        sizes = [each.image.size for each in references if each.image is not None]
        if self.megapixel_unit is not None:
            pixels = sum(prod(megapixel_size(size, self.megapixel_unit)) for size in sizes)
            return int(pixels * LOOKED_AT) if self.keeps else pixels
        most = self.sole_pixels if len(references) == 1 else MOST_PIXELS
        return sum(prod(shown_size(size, unit, most)) for size in sizes)

    def most_exchanged_pixels(self, limit: int, drawn: int = 0) -> int:
        """Pixels whose tokens gangs exchange, of whichever references are most, where `limit` are allowed.

        Args:
            drawn: pixels of the largest picture that is drawn, for models that are shown one in that size, if
                only where a mask is filled in.
        """
        count = 0 if self.keeps else min(limit, self.max_references)
        if self.as_drawn:
            return count * drawn
        others = (count - 1) * MOST_PIXELS
        return max(others + MOST_PIXELS, self.sole_pixels, others + drawn) if count else 0


def check_reference(picture: Picture, name: str) -> None:
    """Raise InvalidRequest, by that name, for a picture too small or too narrow to draw after."""
    shorter, longer = sorted(picture.size)
    if shorter < LEAST_SIDE or longer > LONGEST * shorter:
        width, height = picture.size
        least = f"sides of {LEAST_SIDE} or more, the longer at most {LONGEST} times the shorter"
        raise InvalidRequest(f"{name} is {width}x{height} pixels; what is edited has {least}", name)
