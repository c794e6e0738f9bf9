"""Requests: one type for every interface."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from distriray.adapters import Lora
from distriray.config import ExchangeMode, ParallelConfig
from distriray.controls import Control
from distriray.errors import InvalidRequest
from distriray.ip_adapters import IPAdapter
from distriray.picture import Picture
from distriray.quantities import Count, NonNegative, PositiveSeconds
from distriray.references import Reference
from distriray.steps import STEP_COUNTS, SchedulerName, StepCount
from distriray.validation import invalid_request

MAX_SEEDS = 2**63
"""Seeds are below this, those of all images of a request."""

MOST_LISTED = 100
"""Entries of any list of a request; services set their own bounds below it. Nobody looks at those behind."""

Seed = Annotated[int, Field(ge=0, lt=MAX_SEEDS)]
MULTIPLE_OF = 8
"""Heights and widths are multiples of this many pixels, and so is the unit of each model."""

Sides = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$")]
"""A width and a height in pixels, such as "1024x768"."""

Place = Annotated[str, Field(pattern=r"^[0-9]{1,5},[0-9]{1,5}$")]
"""Pixels from the left and from the top, such as "0,128"."""


class SamplingParams(BaseModel):
    """The fields that decide a picture: names, types, defaults and descriptions for every interface.

    HTTP, the clients, handles, jobs and the command line derive their own fields from these, and a worker
    hands the group to `Denoiser.prepare`. A field that is added here goes through all of them.

    Raises:
        InvalidRequest: a value is out of range; `param` names it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    prompt: str
    """What the picture shows."""
    negative_prompt: str | None = None
    """What the picture must not show."""
    prompt_2: str | None = None
    """`prompt` for the second text encoder of SDXL, Stable Diffusion 3 and FLUX.1; by default `prompt`."""
    negative_prompt_2: str | None = None
    """`negative_prompt` for the second text encoder; by default `negative_prompt` itself."""
    prompt_3: str | None = None
    """`prompt` for the third text encoder of Stable Diffusion 3; by default `prompt` itself."""
    negative_prompt_3: str | None = None
    """`negative_prompt` for the third text encoder; by default `negative_prompt` itself."""
    height: Count | None = None
    """In pixels, a multiple of 8 and of the model's unit; the model's own by default."""
    width: Count | None = None
    """In pixels, a multiple of 8 and of the model's unit; the model's own by default."""
    num_inference_steps: Count | None = None
    """Denoising steps; the model's own number by default."""
    guidance_scale: NonNegative | None = None
    """Scale of guidance; classifier-free guidance is off at 1 and below, of Z-Image and Krea 2 at 0
    alone. The model's own by default."""
    guidance_rescale: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """How far the guided noise is rescaled to the contrast of the unguided one, from 0 to 1."""
    guidance_end: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the steps that have guidance, above 0 and at most 1: those after them take half the work."""
    seed: Seed | None = None
    """Seed of the first image; image i has seed + i. Random by default."""
    num_images: Count = 1
    """Images, made together."""
    scheduler: SchedulerName | None = None
    """Noise scheduler; the model's own by default."""
    clip_skip: Annotated[int, Field(ge=0)] | None = None
    """Last layers of the CLIP text encoders to skip for the prompt, beyond the one that SDXL always skips."""
    original_size: Sides | None = None
    """Width and height, such as "1024x768", of the photograph that SDXL is told the picture was made from."""
    crops_coords_top_left: Place | None = None
    """Pixels, such as "0,128", that SDXL is told were cut off at the left and at the top."""
    target_size: Sides | None = None
    """Width and height that SDXL is told the photograph was scaled to."""
    loras: Annotated[tuple[Lora, ...], Field(max_length=MOST_LISTED)] = ()
    """Adapters to draw with, all at once."""
    control: Annotated[tuple[Control, ...], Field(max_length=MOST_LISTED)] = ()
    """ControlNets to draw with, all at once, each with the picture that it goes by."""
    ip_adapters: Annotated[tuple[IPAdapter, ...], Field(max_length=MOST_LISTED)] = ()
    """IP-Adapters to draw with, all at once, each with the picture that it takes after."""
    references: Annotated[tuple[Reference, ...], Field(max_length=MOST_LISTED)] = ()
    """Pictures that the prompt speaks of, in its order, for models that edit: `image` comes before them."""
    image: Picture | None = None
    """A picture to begin from, or to edit, a PNG, JPEG or WebP file.

    Its size is the default, to another it is scaled; of what models edit, the default is a megapixel at most.
    """
    mask_image: Picture | None = None
    """Where to fill `image` in, which has its size: white is drawn anew, black stays.

    Without an `image`, it is of the first of `references`.
    """
    strength: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share of the steps that are done on `image`, above 0 and at most 1; by default 0.6, with a mask 1.

    Models that edit take it with a mask alone.
    """

    FILES: ClassVar[tuple[str, ...]] = ("image", "mask_image")
    """The fields that are pictures."""
    WITH_IMAGES: ClassVar[tuple[str, ...]] = ("control", "ip_adapters", "references")
    """The fields that are lists, of entries that have an `image` each."""

    if not TYPE_CHECKING:

        def __init__(self, **data: Any) -> None:
            try:
                super().__init__(**data)
            except ValidationError as error:
                raise invalid_request(error) from None

    @field_validator("prompt", "prompt_2", "prompt_3", *(f"negative_prompt{n}" for n in ("", "_2", "_3")))
    @classmethod
    def _is_text(cls, value: str | None, info: Any) -> str | None:
        """Half a surrogate pair, as shells and Python's JSON let through, is for no tokenizer, nor HTTP."""
        try:
            (value or "").encode()
        except UnicodeEncodeError as error:
            half = f"U+{ord(error.object[error.start]):X} at {error.start}"
            raise InvalidRequest(
                f"{info.field_name} is no Unicode: {half} is half a character; leave it out", info.field_name
            ) from None
        return value

    @field_validator("height", "width")
    @classmethod
    def _is_multiple(cls, value: int | None, info: Any) -> int | None:
        check_sides(**{info.field_name: value}, unit=MULTIPLE_OF)
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

    @model_validator(mode="after")
    def _check_pictures(self) -> Self:
        drawn_on = self.drawn_on
        for name in ("mask_image", "strength"):
            if getattr(self, name) is not None and drawn_on is None:
                raise InvalidRequest(
                    f"{name} is of an image, and there is none; give one, or leave it out", name
                )
        if drawn_on is not None and self.mask_image is not None and self.mask_image.size != drawn_on.size:
            (width, height), (wide, high) = self.mask_image.size, drawn_on.size
            name = "image" if self.image is not None else image_of("references", 0)
            raise InvalidRequest(
                f"mask_image is {width}x{height} pixels and {name} {wide}x{high}; give both the same size",
                "mask_image",
            )
        return self

    @property
    def drawn_on(self) -> Picture | None:
        """What the steps of `strength` are done on: `image`, or, of a mask alone, the first of `references`.

        Models that edit fill in masks of that, and have no `image` once a request is settled.
        """
        if self.image is None and self.mask_image is not None and self.references:
            return self.references[0].image
        return self.image

    def num_steps(self, own: StepCount, *, rounds_up: bool = False) -> int:
        """Calls of the network.

        Args:
            own: the count of the model's own scheduler.
            rounds_up: how the model makes whole steps of a share of them.

        Raises:
            InvalidRequest: steps or strength are left to the model still, or there are no steps to do.
        """
        steps, strength = self.num_inference_steps, self.strength
        if steps is None:
            raise InvalidRequest(
                "the number of steps is the model's own, and not known yet", "num_inference_steps"
            )
        skipped = 0
        if self.drawn_on is not None:
            if strength is None:
                raise InvalidRequest("strength is left open, and not known yet", "strength")
            # the numbers of diffusers' pipelines, also where a product is a hair from a whole one
            skipped = int(steps - steps * strength) if rounds_up else steps - int(steps * strength)
        if skipped == steps:
            least = ceil(1000 / steps) / 1000
            raise InvalidRequest(
                f"strength {strength:g} of {steps} steps leaves none to do; use {least:g} or more",
                "strength",
            )
        named = STEP_COUNTS.get(self.scheduler, StepCount()) if self.scheduler else own
        return named.of(steps, skipped)

    @property
    def seeds(self) -> list[int]:
        """One seed for each image; raises InvalidRequest while there is none."""
        if self.seed is None:
            raise InvalidRequest("there is no seed yet; set `seed`, or call `seeded` first", "seed")
        return [self.seed + i for i in range(self.num_images)]

    def seeded(self, seed: int | None = None) -> Self:
        """A copy with a seed: its own, else `seed`, else a random one."""
        if self.seed is not None:
            return self
        return self.model_copy(update={"seed": secrets.randbelow(2**32) if seed is None else seed})

    def settled(self, height: int, width: int, defaults: Defaults | None = None) -> Self:
        """A copy with a size, a seed, and what `defaults` say of what it leaves open.

        The size is by default that of its image, else this one.
        """
        if self.image is not None:
            width, height = self.image.size
        own = {"height": height, "width": width, **dict(Defaults() if defaults is None else defaults)}
        left_open = {name: value for name, value in own.items() if getattr(self, name) is None}
        return self.seeded().model_copy(update=left_open)

    @property
    def pictures(self) -> dict[str, Picture]:
        """The pictures that it carries, by field."""
        own = {name: picture for name in self.FILES if (picture := getattr(self, name)) is not None}
        listed = {
            image_of(field, index): each.image
            for field in self.WITH_IMAGES
            for index, each in enumerate(getattr(self, field))
        }
        return own | {name: picture for name, picture in listed.items() if picture is not None}

    def without_pictures(self) -> Self:
        """A copy that carries none, for those who have them or need them no more.

        What it lists with images has None for each: `with_pictures` puts them back.
        """
        return self.with_pictures(dict.fromkeys(self.pictures)) if self.pictures else self

    def with_pictures(self, pictures: Mapping[str, Picture | None]) -> Self:
        """A copy with other pictures, by the names that `pictures` gives them."""
        listed = {
            field: tuple(
                each.model_copy(update={"image": pictures[name]})
                if (name := image_of(field, index)) in pictures
                else each
                for index, each in enumerate(getattr(self, field))
            )
            for field in self.WITH_IMAGES
        }
        own = {name: picture for name, picture in pictures.items() if name in self.FILES}
        return self.model_copy(update={**own, **listed})

    def check_size(self, unit: int) -> None:
        """Raise InvalidRequest, with what would do, unless its size is one of multiples of `unit` pixels."""
        if self.image is not None and self.has_images_size and any(side % unit for side in self.image.size):
            width, height = self.image.size
            scaled = "x".join(str(max(unit, round(side / unit) * unit)) for side in self.image.size)
            raise InvalidRequest(
                f"image is {width}x{height} pixels, and sizes are multiples of {unit} here; "
                f"name a size that it is scaled to, such as {scaled}",
                "image",
            )
        check_sides(self.height, self.width, unit)

    @property
    def has_images_size(self) -> bool:
        """Whether it asks for a picture of just the size of its image."""
        asked = self.width, self.height
        return self.image is not None and asked in ((None, None), self.image.size)


def image_of(field: str, index: int) -> str:
    """The name of the picture of an entry of such a field as `control`."""
    return f"{field}.{index}.image"


class Defaults(BaseModel):
    """Values for what requests leave open: turbo and lightning models want few steps and little
    guidance, behind clients that can send neither. None is the model's own.

    Attributes:
        num_inference_steps: denoising steps.
        guidance_scale: of guidance; 1 or less turns the classifier-free kind off, of Z-Image and Krea 2
            0 alone.
        scheduler: noise scheduler.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_inference_steps: Count | None = None
    guidance_scale: NonNegative | None = None
    scheduler: SchedulerName | None = None


def check_sides(height: int | None = None, width: int | None = None, unit: int = MULTIPLE_OF) -> None:
    """Raise InvalidRequest, with the nearest that are, unless both sides are multiples of `unit` pixels."""
    for name, side in (("height", height), ("width", width)):
        if side is not None and side % unit:
            below = side - side % unit
            choices = f"{below} or {below + unit}" if below else f"{unit}"
            raise InvalidRequest(f"{name} {side} is not a multiple of {unit}; use {choices}", name)


class GenerationRequest(SamplingParams):
    """One batch of images of one prompt: the fields of `SamplingParams`, and how to serve them.

    Raises:
        InvalidRequest: a value is out of range; `param` names it.
    """

    model: str | None = None
    """One of the served models; None is the only or the default one."""
    gang_size: Count | Literal["auto"] = "auto"
    """Workers to use; `auto` leaves it to the host's policy, which may change it between steps."""
    deadline_s: PositiveSeconds | None = None
    """Seconds from submission to the finished picture; a service refuses at once what it cannot meet."""
    priority: Annotated[int, Field(ge=-10, le=10)] = 0
    """Larger is more important, to hosts whose policy is `elastic`: each unit doubles its share."""
    previews: Annotated[int, Field(ge=0)] = 0
    """Intermediate pictures to send while it runs, evenly spread over the steps."""
    exchange: ExchangeMode | None = None
    """How the gang shares a step, in place of the host's own `parallel.exchange`.

    What the only segment of a result names, given here, makes its picture again. A mix of the host's own, of
    which it has the fields, is had by leaving this out.
    """
    parallel: ParallelConfig | None = None
    """All of how the gang shares a step; None is the host's own configuration."""
    id: Annotated[str, Field(min_length=1, max_length=200)] = Field(default_factory=lambda: uuid4().hex)
    """Name in events, logs and `cancel`; unique among unfinished requests."""

    @model_validator(mode="after")
    def _check_exchange(self) -> Self:
        if self.exchange is not None and self.parallel is not None:
            raise InvalidRequest("exchange and parallel.exchange are one thing; give one of them", "exchange")
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
        """A whole request as it is, or one made of a prompt and the other fields.

        Raises:
            TypeError: `fields` beside a whole request, or a second prompt.
            InvalidRequest: the fields make none.
        """
        if isinstance(request, str):
            if "prompt" in fields:
                raise TypeError("the prompt was given twice")
            return cls.parse({"prompt": request, **fields})
        if fields:
            raise TypeError(f"set {sorted(fields)} on the GenerationRequest itself")
        return request

    def shared(self, parallel: ParallelConfig) -> ParallelConfig:
        """The way in which the gang shares a step, on a host that is configured so."""
        if self.exchange is not None:
            return parallel.model_copy(update={"exchange": self.exchange})
        return self.parallel or parallel

    def preview_steps(self, num_steps: int) -> frozenset[int]:
        """The calls of the network, of `num_steps` (1 is the first), after which a preview is sent."""
        count = self.previews
        return frozenset(round((i + 1) * num_steps / (count + 1)) for i in range(count)) - {0, num_steps}
