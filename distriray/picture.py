"""The pictures that a request carries, encoded as they came."""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from binascii import Error as NotBase64
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Self

from PIL import ExifTags, Image, ImageOps
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, GetPydanticSchema, ValidationInfo
from pydantic_core import CoreSchema, core_schema

from distriray.errors import InvalidRequest

FORMATS = ("PNG", "JPEG", "WEBP")
LARGEST_BYTES, LARGEST_PIXELS = 64 * 2**20, 2**26
"""Bounds of any picture; a service sets its own below them."""

LARGEST_SCANS, LARGEST_PARTS = 100, 2000
"""Scans of any JPEG, and parts of it or of a PNG, of which a file may have a million: each scan may change
every pixel, where ten make a picture, and for each part Pillow copies all EXIF or inflates a profile."""

_AS_URL = "write data:image/png;base64, and the file in base64"
_DATA_URL = re.compile(r"data:image/[a-z]{1,8};base64,", re.IGNORECASE)
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")
"""What a part of a JPEG begins with that is followed by its length, but for the end (ITU-T T.81, B.1.1)."""
_JPEG, _SCAN, _END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
_PNG, _PIXELS = b"\x89PNG\r\n\x1a\n", b"IDAT"
_OF_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_TURNS_SIDES = range(5, 9)
"""EXIF orientations by which height and width change places."""


@dataclass(frozen=True, slots=True, repr=False)
class Picture:
    """A PNG, JPEG or WebP file of one picture, of which only the header was read.

    In Python it is made of the file's bytes, its `pathlib.Path`, or a PIL image; in JSON it is a `data:` URL.

    Attributes:
        data: the file.
        format: `png`, `jpeg` or `webp`, by its content.
        size: (width, height) in pixels, as it is shown.
        orientation: as EXIF counts it; 1 is upright.
        path: where it was read, if it was.
        implied: nobody sent it: a mask that is what is transparent in the image.
    """

    data: bytes
    format: str
    size: tuple[int, int]
    orientation: int = 1
    path: Path | None = field(default=None, compare=False)
    implied: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, source: Any, name: str = "image") -> Self:
        """The picture in `source`; `name` is what errors call it.

        Raises:
            InvalidRequest: it is none, has several frames, or is beyond the bounds.
        """
        match source:
            case cls():
                return source
            case bytes():
                return cls._read(source, name)
            case Path():
                return replace(cls._read(_content(source, name), name), path=source)
            case Image.Image():
                return cls._read(_file_of(source, name), name)
            case str():
                return cls._read(_decoded(source, name), name)
        kinds = "bytes, a pathlib.Path, a PIL image or a data: URL"
        raise InvalidRequest(f"{name} is a {type(source).__name__}; use {kinds}", name)

    @classmethod
    def _read(cls, data: bytes, name: str) -> Self:
        if len(data) > LARGEST_BYTES:
            raise InvalidRequest(
                f"{name} has {len(data)} bytes; no picture may have over {LARGEST_BYTES}", name
            )
        _check_parts(data, name)
        try:
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                kind = "JPEG" if image.format == "MPO" else image.format
                frames = 1 if kind == "JPEG" else getattr(image, "n_frames", 1)
                # of a PNG it would be looked for behind the pixels too
                has_exif = kind != "PNG" or "exif" in image.info
                orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if has_exif else 1
        except Exception as error:  # whatever a decoder of foreign bytes comes to
            known = "a PNG, JPEG or WebP file"
            raise InvalidRequest(f"{name} cannot be read; send {known}", name) from error
        if width * height > LARGEST_PIXELS:
            raise InvalidRequest(
                f"{name} is {width}x{height} pixels; no picture may have over {LARGEST_PIXELS}", name
            )
        if frames > 1:
            raise InvalidRequest(f"{name} is animated, of {frames} frames; send one picture", name)
        if orientation not in range(1, 9):
            orientation = 1
        size = (height, width) if orientation in _TURNS_SIDES else (width, height)
        return cls(data, str(kind).lower(), size, orientation)

    def load(self, name: str = "image") -> Image.Image:
        """Its pixels, upright: RGB, or RGBA where it has transparency. 16 bits a channel become 8.

        Raises:
            InvalidRequest: the file is damaged; the message has its path too, if it was read from one.
        """
        try:
            with Image.open(BytesIO(self.data), formats=FORMATS) as image:
                image.load()
                eight_bits: Image.Image = image
                if image.mode.startswith("I"):  # 16 of grey
                    eight_bits = image.convert("I").point([level >> 8 for level in range(2**16)], "L")
                upright = eight_bits.convert("RGBA" if eight_bits.has_transparency_data else "RGB")
        except Exception as error:
            where = name if self.path is None else f"{name} {str(self.path)!r}"
            why = f"is damaged or cut short: {_said(error)}"
            raise InvalidRequest(f"{where} {why}", name, f"{name} {why}") from error
        method = _UPRIGHT.get(self.orientation)
        return upright if method is None else upright.transpose(method)

    @property
    def url(self) -> str:
        """The picture as a `data:` URL."""
        return f"data:image/{self.format};base64,{b64encode(self.data).decode()}"

    def __repr__(self) -> str:
        return f"Picture({self.format}, {self.size[0]}x{self.size[1]}, {len(self.data)} bytes)"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def made(value: Any, info: ValidationInfo) -> Picture:
            name = info.field_name or "image"
            if info.mode == "json" and not isinstance(value, str):
                raise InvalidRequest(f"{name} is no text; {_AS_URL}", name)
            return cls.of(value, name)

        serialization = core_schema.plain_serializer_function_ser_schema(lambda picture: picture.url)
        return core_schema.with_info_plain_validator_function(made, serialization=serialization)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string", "pattern": f"^{_DATA_URL.pattern}"}


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of that orientation upright."""


CarriedPicture = Annotated[Picture | None, GetPydanticSchema(lambda _, handler: handler(Picture))]
"""A picture that no request can leave out: None is in copies alone (`SamplingParams.without_pictures`)."""


def png(image: Image.Image) -> bytes:
    """`image` as a file, without loss, made fast rather than small."""
    out = BytesIO()
    image.save(out, "PNG", compress_level=1)
    return out.getvalue()


def opaque(image: Image.Image) -> Image.Image:
    """RGB: what is transparent shows white."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def mask_of(picture: Picture) -> Image.Image:
    """The grey levels of a mask, white where to fill in.

    Raises:
        InvalidRequest: it is damaged, or has transparency, which says nothing of where.
    """
    image = picture.load("mask_image")
    if image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255):
        message = "mask_image has transparent parts; make it white where to fill in and black elsewhere"
        raise InvalidRequest(message, "mask_image")
    return image.convert("L")


def holes(image: Image.Image) -> Image.Image | None:
    """A mask of where `image` is fully transparent, white there and black elsewhere; None if nowhere."""
    if image.mode != "RGBA":
        return None
    mask = image.getchannel("A").point([255] + [0] * 255)
    return mask if mask.getbbox() else None


def _file_of(image: Image.Image, name: str) -> bytes:
    if image.mode in ("F", "I"):
        raise InvalidRequest(f"{name} has mode {image.mode}, of no fixed white; convert it to L or RGB", name)
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode not in _OF_PNG:
            upright = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
        return png(upright)
    except (OSError, ValueError) as error:  # a file that is damaged, or a mode that is rare
        raise InvalidRequest(f"{name} of mode {image.mode} cannot be read: {error}", name) from error


def _content(path: Path, name: str) -> bytes:
    why = "no such file"
    try:
        if path.is_file():  # a pipe could keep whoever reads it waiting
            with path.open("rb") as file:
                return file.read(LARGEST_BYTES + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "no path"
    raise InvalidRequest(f"{name} {str(path)!r} cannot be read: {why}", name, f"{name} cannot be read: {why}")


def _decoded(url: str, name: str) -> bytes:
    found = _DATA_URL.match(url)
    if found is None:
        raise InvalidRequest(f"{name} is no data: URL; {_AS_URL}", name)
    try:
        return b64decode(url[found.end() :], validate=True)
    except (NotBase64, ValueError) as error:
        raise InvalidRequest(f"{name} is no base64: {error}", name) from error


def _check_parts(data: bytes, name: str) -> None:
    """Raise InvalidRequest for a JPEG or a PNG of too many parts, or of too many scans."""
    parts = _jpeg_parts(data) if data.startswith(_JPEG) else _png_parts(data) if data.startswith(_PNG) else ()
    scans = 0
    for count, kind in enumerate(parts, 1):
        scans += kind == _SCAN
        if scans > LARGEST_SCANS or count > LARGEST_PARTS:
            most = f"{LARGEST_SCANS} scans" if scans > LARGEST_SCANS else f"{LARGEST_PARTS} parts"
            raise InvalidRequest(f"{name} has over {most}; save it anew", name)


def _jpeg_parts(jpeg: bytes) -> Iterator[bytes]:
    """The kinds of its parts. What lies within one, such as a small picture, or behind the end, as phones put
    films, is none."""
    at = 2
    while (found := _MARKER.search(jpeg, at)) and found[0] != _END:
        yield found[0]
        at = found.end() + int.from_bytes(jpeg[found.end() : found.end() + 2])


def _png_parts(png: bytes) -> Iterator[bytes]:
    """The kinds of its parts, without those of its pixels, which may be any number."""
    at = len(_PNG)
    while kind := png[at + 4 : at + 8]:
        if kind != _PIXELS:
            yield kind
        at += 12 + int.from_bytes(png[at : at + 4])


def _said(error: Exception) -> str:
    return str(error)[:100] or type(error).__name__
