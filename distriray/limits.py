"""The limits that services set to requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from distriray.errors import InvalidRequest
from distriray.names import KINDS
from distriray.picture import LARGEST_BYTES, LARGEST_PIXELS, Picture
from distriray.quantities import Count
from distriray.requests import MOST_LISTED, GenerationRequest

_Listed = Annotated[int, Field(ge=0, le=MOST_LISTED)]


class Limits(BaseModel):
    """The largest and smallest values that a service accepts; a refusal names the limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_side: Count = 64
    max_side: Count = 4096
    max_pixels: Count = 4096 * 4096
    max_steps: Count = 200
    max_images: Count = 8
    max_guidance_scale: Annotated[float, Field(gt=0.0)] = 50.0
    max_prompt_chars: Count = 4000
    max_previews: Count = 8
    max_clip_skip: Annotated[int, Field(ge=0)] = 11
    max_image_bytes: Annotated[int, Field(ge=1, le=LARGEST_BYTES)] = 16 * 2**20
    max_image_pixels: Annotated[int, Field(ge=1, le=LARGEST_PIXELS)] = 4096 * 4096
    max_loras: _Listed = 8
    max_controls: _Listed = 4
    max_ip_adapters: _Listed = 4
    max_references: _Listed = 4

    LARGEST: ClassVar[dict[str, str]] = {
        "num_inference_steps": "max_steps",
        "num_images": "max_images",
        "guidance_scale": "max_guidance_scale",
        "previews": "max_previews",
        "clip_skip": "max_clip_skip",
    }
    """The limit of each field that has a largest value."""
    LONGEST: ClassVar[dict[str, str]] = {
        **{field: f"max_{kind.option}" for field, kind in KINDS.items()},
        "references": "max_references",
    }
    """The limit of each field that is a list."""
    TEXTS: ClassVar[tuple[str, ...]] = (
        "prompt",
        "negative_prompt",
        "prompt_2",
        "negative_prompt_2",
        "prompt_3",
        "negative_prompt_3",
    )
    """The fields that may have `max_prompt_chars` characters."""

    @model_validator(mode="after")
    def _check_some_size_is_left(self) -> Self:
        for limit, least in {"max_side": self.min_side, "max_pixels": self.min_side**2}.items():
            if (most := getattr(self, limit)) < least:
                raise ValueError(
                    f"{limit} {most} leaves no size whose sides are min_side {self.min_side} or more; "
                    f"raise it to {least}, or lower min_side"
                )
        return self

    def check(self, request: GenerationRequest, sent: GenerationRequest | None = None) -> None:
        """Raise InvalidRequest, with the limit and the field, unless `request` keeps every limit.

        What it leaves open is checked once it is settled; `sent` is as it was before.
        """
        for field, limit in self.LARGEST.items():
            self._at_most(field, getattr(request, field), getattr(self, limit))
        for field in self.TEXTS:
            length = len(getattr(request, field) or "")
            if length > self.max_prompt_chars:
                raise InvalidRequest(
                    f"{field} has {length} characters; the limit is {self.max_prompt_chars}", field
                )
        self.check_lists(request)
        self.check_pictures(request.pictures)
        self._check_size(request, sent or request)

    def check_lists(self, request: GenerationRequest) -> None:
        """The same of how much `request` lists, before any picture among it is decoded."""
        for field, limit in self.LONGEST.items():
            count, most = len(getattr(request, field)), getattr(self, limit)
            if count > most:
                word = KINDS[field].word if field in KINDS else "picture"
                named = f"{count} {word}{'s' * (count > 1)}"
                raise InvalidRequest(f"{field} names {named}; the limit is {most}", field)

    def check_pictures(self, pictures: Mapping[str, Picture]) -> None:
        """The same of pictures by field, before any of them is decoded."""
        for field, picture in pictures.items():
            (width, height), length = picture.size, len(picture.data)
            if length > self.max_image_bytes:
                raise InvalidRequest(
                    f"{field} has {length} bytes; the limit is {self.max_image_bytes}", field
                )
            if width * height > self.max_image_pixels:
                limit = f"the limit is {self.max_image_pixels} in all"
                raise InvalidRequest(f"{field} has {width}x{height} pixels; {limit}", field)

    def _check_size(self, request: GenerationRequest, sent: GenerationRequest) -> None:
        whose = ""
        if request.has_images_size:
            whose = "; it is the image's own, name a size that it is scaled to"
        elif request.references and sent.height is None and sent.width is None:
            whose = "; where none is named it goes by the first picture, name a size"
        for field in ("height", "width"):
            side = getattr(request, field)
            if side is not None:
                self._at_most(field, side, self.max_side, whose)
                if side < self.min_side:
                    raise InvalidRequest(
                        f"{field} {side} is below the limit of {self.min_side}{whose}", field
                    )
        if request.height and request.width and request.height * request.width > self.max_pixels:
            raise InvalidRequest(
                f"height {request.height} by width {request.width} is more than the limit of "
                f"{self.max_pixels} pixels{whose}",
                "height",
            )

    @classmethod
    def widest(cls, limits: Iterable[Limits]) -> Limits:
        """Limits that allow, field by field, whatever at least one of `limits` does."""
        each = list(limits)
        return cls(
            **{
                name: (min if name.startswith("min_") else max)(getattr(one, name) for one in each)
                for name in cls.model_fields
            }
        )

    @staticmethod
    def _at_most(field: str, value: float | None, limit: float, whose: str = "") -> None:
        if value is not None and value > limit:
            raise InvalidRequest(f"{field} {value} is above the limit of {limit}{whose}", field)
