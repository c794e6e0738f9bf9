"""The requests for images, in OpenAI's words: one in JSON, and those with pictures in forms."""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Container, Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NoReturn, Self, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
)
from pydantic.fields import FieldInfo

from deployments.http.encode import FULL_QUALITY, OutputFormat
from deployments.http.errors import Refusal, refusal_of_fields
from distriray.errors import InvalidRequest
from distriray.picture import Picture, holes, mask_of, png
from distriray.requests import GenerationRequest, image_of
from distriray.service import ModelCard
from distriray.wire import CARRIED, EDITS, OF_PICTURES, PARAMS, Code, decode_fields

MOST_COMMAS = 10_000
"""In a body's JSON: behind each may be a value, and of each that is wrong an error is made, of kilobytes."""


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


# To JSON Schema, and to clients in languages with one kind of number, 3.0 is an integer.
WHOLE = BeforeValidator(_whole)
Positive = Annotated[int, Field(ge=1), WHOLE]
NotNegative = Annotated[int, Field(ge=0), WHOLE]
Percent = Annotated[int, Field(ge=0, le=100), WHOLE]


def _optional(field: FieldInfo) -> tuple[Any, None]:
    """A field of a GenerationRequest as HTTP has it: null is its default, and 3.0 is an integer."""
    kind: Any = field.annotation
    for constraint in field.metadata:
        kind = Annotated[kind, constraint]
    default = "" if field.is_required() or field.default in (None, ()) else f" {field.default} by default."
    described = Annotated[kind | None, Field(description=f"{field.description}{default}")]
    lists = get_origin(field.annotation) is tuple  # which are read as the JSON that they are
    return described if lists else Annotated[described, WHOLE], None


if TYPE_CHECKING:

    class _Shared(BaseModel):
        pass
else:
    _Shared = create_model(
        "_Shared",
        **{
            name: _optional(field)
            for name, field in GenerationRequest.model_fields.items()
            if name in CARRIED and name not in {*PARAMS, *OF_PICTURES}
        },
    )


def _rule(when: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    return {"if": {"required": list(when), "properties": when}, "then": {"properties": then}}


# What one field demands of another, for readers of the document; `_check_together` enforces it.
_RULES: list[JsonValue] = [
    _rule(
        {"stream": {"const": True}},
        {"n": {"enum": [1, None]}, "response_format": {"enum": ["b64_json", None]}},
    ),
    {
        "if": {"not": {"required": ["stream"], "properties": {"stream": {"const": True}}}},
        "then": {"properties": {"partial_images": {"enum": [0, None]}, "progress": {"enum": [False, None]}}},
    },
    {
        "if": {
            "not": {
                "required": ["output_format"],
                "properties": {"output_format": {"enum": ["jpeg", "webp"]}},
            }
        },
        "then": {"properties": {"output_compression": {"enum": [FULL_QUALITY, None]}}},
    },
]


class ImageRequest(_Shared):
    """A request to draw. Absent fields and null mean the default; an unknown field is refused."""

    EVENTS: ClassVar[str] = "image_generation"
    """What the names of its events begin with."""
    FILES: ClassVar[tuple[str, ...]] = ()
    """The fields that are pictures."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        json_schema_extra={
            "allOf": _RULES,
            "examples": [{"prompt": "a lake at dusk, snowy mountains", "size": "256x256", "seed": 1}],
        },
    )

    prompt: Annotated[str, Field(min_length=1, description="What the picture shows.")]
    model: Annotated[str | None, Field(description="One of /v1/models; by default the first.")] = None
    n: Annotated[Positive | None, Field(description="How many images; 1 by default and when streaming.")] = (
        None
    )
    size: Annotated[
        str | None,
        Field(
            pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$",
            description="Width x height in pixels, multiples of 8; `auto`, the default, is the model's own.",
        ),
    ] = None
    response_format: Annotated[
        Literal["b64_json", "url"] | None,
        Field(description="`url` gives a data: URL, which is the picture itself. `b64_json` by default."),
    ] = None
    output_format: Annotated[OutputFormat | None, Field(description="`png` by default.")] = None
    output_compression: Annotated[
        Percent | None,
        Field(description="Quality of jpeg and webp; 100, the best, by default and for png."),
    ] = None
    quality: Annotated[
        Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None,
        Field(description="For clients that always send it: num_inference_steps decides, whatever it says."),
    ] = None
    moderation: Annotated[
        Literal["auto", "low"] | None,
        Field(description="For clients that always send it: the model's own safety checker decides."),
    ] = None
    style: Annotated[
        None, Field(description="null, for clients that always send it: the prompt decides.")
    ] = None
    background: Annotated[
        Literal["auto", "opaque"] | None,
        Field(description="Pictures are opaque, but for Qwen-Image 2.1's, whatever this says."),
    ] = None
    user: Annotated[
        str | None, Field(max_length=256, description="Your name for who asks; written to the log.")
    ] = None
    stream: Annotated[bool | None, Field(description="Answer with server-sent events.")] = None
    partial_images: Annotated[
        NotNegative | None,
        Field(description="Previews to stream, evenly spread over the steps; 0 by default."),
    ] = None
    progress: Annotated[
        bool | None, Field(description="Stream `image_generation.progress` events as well; false by default.")
    ] = None

    @classmethod
    def parse(cls, body: bytes) -> ImageRequest:
        """The request in a JSON text.

        Raises:
            InvalidRequest: fields that do not go together.
            Refusal (400): it cannot be read, or has a field that is none or has no such value.
        """
        if body.count(b",") > MOST_COMMAS:
            message = (
                f"the body cannot be read: it has over {MOST_COMMAS} commas, and no request needs so many"
            )
            raise Refusal(400, Code.INVALID_JSON, message)
        try:
            # Editors on Windows begin a file with it, and a parser may ignore it (RFC 8259, 8.1).
            request = cls.model_validate_json(body.removeprefix(BOM_UTF8))
        except ValidationError as error:
            raise refusal_of_fields(error) from None
        request._check_together()
        return request

    def _check_together(self) -> None:
        if self.stream and (self.n or 1) > 1:
            raise InvalidRequest(f"n {self.n}: streaming makes one image; leave n out", "n")
        if self.stream and self.response_format == "url":
            message = "response_format 'url': events carry b64_json; leave response_format out"
            raise InvalidRequest(message, "response_format")
        if self.partial_images and not self.stream:
            message = f"partial_images {self.partial_images}: only a stream carries them; set stream to true"
            raise InvalidRequest(message, "partial_images")
        if self.progress and not self.stream:
            message = "progress true: only a stream carries it; set stream to true"
            raise InvalidRequest(message, "progress")
        if self.format == "png" and self.compression < FULL_QUALITY:
            message = (
                f"output_compression {self.compression}: png loses nothing; "
                "leave it out, or set output_format to jpeg or webp"
            )
            raise InvalidRequest(message, "output_compression")

    @property
    def has_pictures(self) -> bool:
        """Whether there are pictures to look at."""
        return any(getattr(self, field) for field in GenerationRequest.WITH_IMAGES)

    @property
    def format(self) -> OutputFormat:
        return self.output_format or "png"

    @property
    def compression(self) -> int:
        return FULL_QUALITY if self.output_compression is None else self.output_compression

    def generation(self, card: ModelCard, request_id: str) -> GenerationRequest:
        """The same in distriray's words, for a model.

        Looks at every pixel of its pictures, if it has any: call it in a thread.

        Raises:
            InvalidRequest: a field, or a picture, cannot be served as it is.
        """
        fields = decode_fields({name: value for name, value in self if value is not None})
        request = GenerationRequest.parse({**fields, "model": card.id, "id": request_id})
        listed = {name: each for name, each in request.pictures.items() if name not in OF_PICTURES}
        card.limits.check_lists(request)
        card.limits.check_pictures(listed)
        for name, picture in listed.items():
            picture.load(name)
        return request


if TYPE_CHECKING:

    class _WithPictures(ImageRequest):
        image: Picture | None = None
        mask_image: Picture | None = None
else:
    _WithPictures = create_model(
        "_WithPictures",
        __base__=ImageRequest,
        **{name: _optional(GenerationRequest.model_fields[name]) for name in OF_PICTURES},
    )


class EditRequest(_WithPictures):
    """A form of a picture to draw on, and where. The part of `mask` that is fully transparent is drawn anew,
    and without a mask that of `image`, unless the model edits; `mask_image` says it in white and black."""

    EVENTS = "image_edit"
    FILES: ClassVar[tuple[str, ...]] = ("image", "mask", "mask_image")

    model_config = ConfigDict(json_schema_extra={"allOf": _RULES, "examples": []})

    image: Annotated[
        Picture,
        Field(
            description="The picture: a PNG, JPEG or WebP file. A form may have several, as `image[]`, for "
            "models that edit: those after the first are `references`."
        ),
    ]
    mask: Annotated[
        Picture | None,
        Field(description="A file of the size of `image`, transparent where that is to be drawn anew."),
    ] = None
    input_fidelity: Annotated[
        Literal["high", "low"] | None,
        Field(description="For clients that always send it: strength decides, whatever it says."),
    ] = None

    @property
    def has_pictures(self) -> bool:
        return True

    @classmethod
    def of_form(cls, form: Mapping[str, str | bytes | list[bytes]]) -> Self:
        """The request in a form's fields; raises as `parse`. Images after the first are references."""
        values: dict[str, Any] = {}
        files: dict[str, dict[int, bytes]] = {}
        others: list[bytes] = []
        for name, value in form.items():
            if isinstance(value, list):
                value, *others = value
            if (found := _OF_ENTRY.fullmatch(name)) and isinstance(value, bytes):
                files.setdefault(found[1], {})[int(found[2])] = value
                continue
            if isinstance(value, bytes) and name in cls.model_fields and name not in EditRequest.FILES:
                raise InvalidRequest(f"{name} is sent as a file; send it as text", name)
            if isinstance(value, str) and name in cls.FILES and value[:5].lower() != "data:":
                raise InvalidRequest(f"{name} is sent as text; send it as a file, or as a data: URL", name)
            kinds = _kinds(cls).get(name)
            values[name] = _value(name, value, kinds) if kinds and isinstance(value, str) else value
        for field, of_field in files.items():
            values[field] = _with_files(field, values.get(field), of_field)
        if others and isinstance(listed := values.get("references"), tuple | None):
            values["references"] = (*({"image": file} for file in others), *(listed or ()))
        try:
            request = cls.model_validate(values)
        except ValidationError as error:
            raise refusal_of_fields(error) from None
        request._check_together()
        return request

    def _check_together(self) -> None:
        super()._check_together()
        if self.mask is not None and self.mask_image is not None:
            message = "mask and mask_image are one thing, by transparency and in black and white; send one"
            raise InvalidRequest(message, "mask")

    def generation(self, card: ModelCard, request_id: str) -> GenerationRequest:
        pictures = {name: picture for name in self.FILES if (picture := getattr(self, name)) is not None}
        card.limits.check_pictures(pictures)
        mask = self._mask()
        request = super().generation(card, request_id)
        if mask is None:
            return request
        try:
            return GenerationRequest.parse({**dict(request), "mask_image": mask})
        except InvalidRequest as error:
            raise InvalidRequest(str(error).replace("mask_image", "mask"), "mask") from error

    def _mask(self) -> Picture | None:
        """The part to draw again because it is transparent, of `mask` or, without a mask, of the image.

        The image's own is none to models that edit, which who has such a model knows (`Terms.settle`).
        """
        image = self.image.load()
        if self.mask_image is not None:
            mask_of(self.mask_image)
            return None
        if self.mask is None:
            hole = holes(image)
        elif (hole := holes(self.mask.load("mask"))) is None:
            raise InvalidRequest(
                "mask has no fully transparent part, which is the one to draw anew; give it one, or send "
                "mask_image, white where to draw anew and black elsewhere",
                "mask",
            )
        return None if hole is None else replace(Picture.of(png(hole), "mask"), implied=self.mask is None)


class VariationRequest(EditRequest):
    """A form of a picture to draw another like it of, without a prompt unless there is one."""

    FILES = ("image",)

    prompt: Annotated[
        str | None,
        Field(description="What the picture shows; nothing by default."),
        AfterValidator(lambda prompt: prompt or ""),
    ] = ""  # type: ignore[assignment]  # it is a text, whatever was sent
    mask: None = None
    mask_image: None = None

    @field_validator("mask", "mask_image", mode="before")
    @classmethod
    def _no_mask(cls, given: Any, field: ValidationInfo) -> None:
        if given is not None:
            name = field.field_name
            message = f"variations have no mask; leave {name} out, or send all to {EDITS}, with a prompt"
            raise InvalidRequest(message, name)

    def _mask(self) -> Picture | None:
        self.image.load()
        return None


_OF_ENTRY = re.compile(rf"({'|'.join(GenerationRequest.WITH_IMAGES)})\.(0|[1-9][0-9]{{0,2}})\.image")
"""The file of an entry of a form's `control`, say, which then has none there."""


def _with_files(field: str, listed: Any, files: Mapping[int, bytes]) -> tuple[Any, ...]:
    """The entries of a form's field, each with its file; raises InvalidRequest."""
    entries = list(listed) if isinstance(listed, tuple) else []
    for index, file in files.items():
        if index >= len(entries) or not isinstance(entries[index], dict) or "image" in entries[index]:
            name = image_of(field, index)
            message = f"{name} is a file, and {field} has no entry {index}, from 0, without an image"
            raise InvalidRequest(message, name)
        entries[index] = {**entries[index], "image": file}
    return tuple(entries)


@cache
def _kinds(request: type[EditRequest]) -> dict[str, set[str]]:
    """The types of a form's fields besides text and files, in JSON's words."""
    fields = request.model_json_schema()["properties"]
    return {
        name: {kind.get("type") for kind in field.get("anyOf", [field])} - {"string", "null"}
        for name, field in fields.items()
    }


def _value(name: str, text: str, kinds: Container[str]) -> Any:
    """A text's value in JSON; the text itself where it has none, or one of no such kind."""
    if text.count(",") > MOST_COMMAS:
        raise InvalidRequest(f"{name} has over {MOST_COMMAS} commas, and no request needs so many", name)
    try:
        value = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, list) and "array" in kinds:
        return tuple(value)
    return text if isinstance(value, list | dict | str) else value


def _no_number(text: str) -> NoReturn:
    raise ValueError(text)
