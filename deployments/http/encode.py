"""Pictures as the text that JSON carries."""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO
from typing import Any, Literal

from PIL import Image

from distriray.picture import opaque

OutputFormat = Literal["png", "jpeg", "webp"]
Background = Literal["opaque", "transparent"]

FULL_QUALITY = 100
# Higher levels take several times as long and hardly make a painted picture smaller.
_PNG_LEVEL = 3


def encode(image: Image.Image, output_format: OutputFormat, quality: int = FULL_QUALITY) -> str:
    """Base64 of `image` as a file; `quality` is 0 to 100 and means nothing to PNG, which loses nothing.

    JPEG has no transparency: what is transparent shows white there.
    """
    options: dict[str, Any] = (
        {"compress_level": _PNG_LEVEL} if output_format == "png" else {"quality": quality}
    )
    file = BytesIO()
    (opaque(image) if output_format == "jpeg" else image).save(file, format=output_format, **options)
    return b64encode(file.getbuffer()).decode("ascii")


def background(image: Image.Image, output_format: OutputFormat) -> Background:
    """Whether a part of `image`, as such a file, is transparent."""
    if output_format == "jpeg" or image.mode != "RGBA" or image.getchannel("A").getextrema() == (255, 255):
        return "opaque"
    return "transparent"


def data_url(encoded: str, output_format: OutputFormat) -> str:
    """A URL that is the picture itself (RFC 2397)."""
    return f"data:image/{output_format};base64,{encoded}"
