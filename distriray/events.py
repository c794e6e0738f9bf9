"""Events that a request's owner gets while it is worked on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from PIL import Image

from distriray.results import GenerationResult


@dataclass(frozen=True, slots=True)
class Queued:
    """Accepted, with `position` requests ahead of it and a predicted wait in seconds."""

    kind: ClassVar[str] = "queued"
    request_id: str
    position: int
    predicted_wait_s: float


@dataclass(frozen=True, slots=True)
class Started:
    """The first gang begins; rank 0 is first."""

    kind: ClassVar[str] = "started"
    request_id: str
    workers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """`step` of `num_steps` are done, `seconds` after it was accepted; sparse: not every step is told."""

    kind: ClassVar[str] = "step"
    request_id: str
    step: int
    num_steps: int
    gang_size: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Preview:
    """A small picture of the first image as it is after `step`; `index` counts previews from 0."""

    kind: ClassVar[str] = "preview"
    request_id: str
    step: int
    index: int
    image: Image.Image


@dataclass(frozen=True, slots=True)
class Regrouped:
    """The request goes on from `step` with another gang."""

    kind: ClassVar[str] = "regrouped"
    request_id: str
    workers: tuple[int, ...]
    step: int


@dataclass(frozen=True, slots=True)
class Repaired:
    """Its gang broke; it goes on from `step`, the last that a survivor holds."""

    kind: ClassVar[str] = "repaired"
    request_id: str
    lost_workers: tuple[int, ...]
    step: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request that succeeds."""

    kind: ClassVar[str] = "result"
    request_id: str
    result: GenerationResult


Event = Queued | Started | Step | Preview | Regrouped | Repaired | Finished
