"""What is asked of distriray and what it answers: one pair of types for scripts, handles, HTTP and jobs."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self
from uuid import uuid4

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .config import ParallelConfig
from .errors import InvalidRequest

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]

MULTIPLE_OF = 8
"""Heights and widths are multiples of this many pixels: the reduction of the latent."""

MAX_SEEDS = 2**63
"""Seeds are below this, those of all images of a request."""


class GenerationRequest(BaseModel):
    """One batch of images of one prompt.

    Attributes:
        model: which of the models that are served; None is the only or the default one.
        height, width: in pixels, multiples of 8; None is the model's own size.
        seed: of the first image; image `i` has `seed + i`. None draws one.
        scheduler: a name among `distriray.denoise.SCHEDULERS`; None is the model's own.
        gang_size: workers to use, or `auto`: the host's policy decides, and may change it between steps.
        deadline_s: seconds from submission by which it should be finished.
        priority: larger is more important; each unit doubles its share.
        previews: intermediate pictures to send while it runs, evenly spread over the steps.
        parallel: how the gang shares a step; None is the host's own configuration.
        id: names it in events, logs and `cancel`; unique among unfinished requests.

    Raises:
        InvalidRequest: a value is out of range; `param` names it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    model: str | None = None
    negative_prompt: str | None = None
    height: Count | None = None
    width: Count | None = None
    num_inference_steps: Count = 25
    guidance_scale: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 5.0
    guidance_rescale: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=MAX_SEEDS)] | None = None
    num_images: Count = 1
    scheduler: str | None = None
    gang_size: Count | Literal["auto"] = "auto"
    deadline_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    priority: Annotated[int, Field(ge=-10, le=10)] = 0
    previews: Annotated[int, Field(ge=0)] = 0
    parallel: ParallelConfig | None = None
    id: Annotated[str, Field(min_length=1, max_length=200)] = Field(default_factory=lambda: uuid4().hex)

    if not TYPE_CHECKING:

        def __init__(self, **data: Any) -> None:
            try:
                super().__init__(**data)
            except ValidationError as error:
                raise invalid_request(error) from None

    @field_validator("height", "width")
    @classmethod
    def _is_multiple(cls, value: int | None, info: Any) -> int | None:
        if value is not None and value % MULTIPLE_OF:
            below = value - value % MULTIPLE_OF
            choices = f"{below} or {below + MULTIPLE_OF}" if below else f"{MULTIPLE_OF}"
            raise ValueError(f"{info.field_name} {value} is not a multiple of {MULTIPLE_OF}; use {choices}")
        return value

    @model_validator(mode="after")
    def _check_seeds(self) -> Self:
        if self.seed is not None and self.seed + self.num_images > MAX_SEEDS:
            raise InvalidRequest(
                f"seed {self.seed}: the last of {self.num_images} images would have seed "
                f"{self.seed + self.num_images - 1}, and the largest is {MAX_SEEDS - 1}; "
                f"use at most {MAX_SEEDS - self.num_images}",
                "seed",
            )
        return self

    @classmethod
    def parse(cls, fields: dict[str, Any] | str | bytes) -> Self:
        """A request from a mapping or from JSON text; raises InvalidRequest."""
        try:
            if isinstance(fields, dict):
                return cls.model_validate(fields)
            return cls.model_validate_json(fields)
        except ValidationError as error:
            raise invalid_request(error) from None

    @classmethod
    def of(cls, request: Self | str, fields: dict[str, Any]) -> Self:
        """What is meant by a whole request, or by a prompt with the other fields.

        Raises:
            TypeError: `fields` beside a whole request, or a second prompt.
            InvalidRequest: the fields make none.
        """
        if isinstance(request, str):
            if "prompt" in fields:
                raise TypeError("the prompt was given twice")
            return cls.parse({"prompt": request, **fields})
        if fields:
            raise TypeError(f"{sorted(fields)} belong into the GenerationRequest that was given")
        return request

    @property
    def seeds(self) -> list[int]:
        """One seed for each image; raises InvalidRequest while no seed was chosen."""
        if self.seed is None:
            raise InvalidRequest("the request has no seed yet; call `settled` first", "seed")
        return [self.seed + i for i in range(self.num_images)]

    def settled(self, height: int, width: int) -> Self:
        """This request with everything decided that it left open: its size and its seed."""
        return self.model_copy(
            update={
                "height": height if self.height is None else self.height,
                "width": width if self.width is None else self.width,
                "seed": secrets.randbelow(2**32) if self.seed is None else self.seed,
            }
        )

    def preview_steps(self) -> frozenset[int]:
        """After which steps (1 is the first) a preview is sent."""
        total, count = self.num_inference_steps, self.previews
        return frozenset(round((i + 1) * total / (count + 1)) for i in range(count)) - {0, total}


def invalid_request(error: ValidationError) -> InvalidRequest:
    """The first thing that pydantic found wrong, as one sentence with the field and the value."""
    first = error.errors(include_url=False)[0]
    param = ".".join(str(part) for part in first["loc"] if isinstance(part, int | str)) or None
    param = param.split(".")[0] if param else None
    if first["type"] == "value_error":
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, InvalidRequest):
            return cause
        return InvalidRequest(str(cause), param)
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"there is no field {param!r}", param, "there is no such field")
    if first["type"] == "missing":
        return InvalidRequest(f"{param} is missing", param)
    message = first["msg"][0].lower() + first["msg"][1:]
    what = param or "request"
    return InvalidRequest(f"{what} {_shortened(first['input'])}: {message}", param, f"{what}: {message}")


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Limits(BaseModel):
    """What a service accepts. A request outside is refused with the limit in the message."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_side: Count = 64
    max_side: Count = 4096
    max_pixels: Count = 4096 * 4096
    max_steps: Count = 200
    max_images: Count = 8
    max_guidance_scale: Annotated[float, Field(gt=0.0)] = 50.0
    max_prompt_chars: Count = 4000
    max_previews: Count = 8

    def check(self, request: GenerationRequest) -> None:
        """Raise InvalidRequest, with the limit and the field, unless `request` keeps every limit."""
        self._at_most("num_inference_steps", request.num_inference_steps, self.max_steps)
        self._at_most("num_images", request.num_images, self.max_images)
        self._at_most("guidance_scale", request.guidance_scale, self.max_guidance_scale)
        self._at_most("previews", request.previews, self.max_previews)
        for field in ("prompt", "negative_prompt"):
            length = len(getattr(request, field) or "")
            if length > self.max_prompt_chars:
                raise InvalidRequest(
                    f"{field} has {length} characters; the limit is {self.max_prompt_chars}", field
                )
        for field in ("height", "width"):
            side = getattr(request, field)
            if side is not None:
                self._at_most(field, side, self.max_side)
                if side < self.min_side:
                    raise InvalidRequest(f"{field} {side} is below the limit of {self.min_side}", field)
        if request.height and request.width and request.height * request.width > self.max_pixels:
            raise InvalidRequest(
                f"height {request.height} by width {request.width} is more than the limit of "
                f"{self.max_pixels} pixels",
                "height",
            )

    @classmethod
    def widest(cls, limits: Iterable[Limits]) -> Limits:
        """What at least one of `limits` allows, field by field."""
        each = list(limits)
        return cls(
            **{
                name: (min if name.startswith("min_") else max)(getattr(one, name) for one in each)
                for name in cls.model_fields
            }
        )

    @staticmethod
    def _at_most(field: str, value: float, limit: float) -> None:
        if value > limit:
            raise InvalidRequest(f"{field} {value} is above the limit of {limit}", field)


class Segment(BaseModel):
    """Steps `first_step` to `last_step` (the latter not included) by one gang, rank 0 first.

    Its gang was sent for at `sent_at`, complete at `formed_at` (prompt encoding aside) and through with its
    steps at `left_at`, in seconds since the epoch. `fresh_step_s` and `stale_step_s` are the mean seconds
    of a synchronous and of a displaced step.
    """

    model_config = ConfigDict(frozen=True)

    workers: tuple[int, ...]
    first_step: int
    last_step: int
    seconds: float
    sent_at: float
    formed_at: float
    left_at: float
    fresh_step_s: float | None = None
    stale_step_s: float | None = None

    @property
    def steps(self) -> int:
        return self.last_step - self.first_step


class Timings(BaseModel):
    """Seconds of each phase; `total_s` is from submission to result."""

    model_config = ConfigDict(frozen=True)

    queued_s: Seconds
    prepare_s: Seconds
    denoise_s: Seconds
    decode_s: Seconds
    total_s: Seconds

    @property
    def waiting_s(self) -> float:
        """What no phase explains: forming gangs, waiting between them, sending results."""
        return max(0.0, self.total_s - self.queued_s - self.prepare_s - self.denoise_s - self.decode_s)


class GenerationResult(BaseModel):
    """The images of one request and how they were made. `images` stays out of `model_dump`."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    id: str
    model: str
    height: int
    width: int
    seeds: list[int]
    timings: Timings
    segments: list[Segment]
    repairs: int = 0
    images: Annotated[list[Image.Image], Field(exclude=True, repr=False)]

    @property
    def gang_size(self) -> int:
        """The size of the gang that made most of its steps."""
        steps: dict[int, int] = {}
        for segment in self.segments:
            size = len(segment.workers)
            steps[size] = steps.get(size, 0) + segment.steps
        return max(steps, key=lambda size: steps[size])

    def summary(self) -> dict[str, Any]:
        """Everything but the images, ready for JSON."""
        return {**self.model_dump(mode="json"), "gang_size": self.gang_size}
