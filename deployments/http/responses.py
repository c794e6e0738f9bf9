"""The answers to requests for images, in OpenAI's words: one body, or events."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from deployments.http.encode import Background, OutputFormat
from deployments.http.errors import ErrorResponse
from distriray.config import ExchangeMode, Mix
from distriray.results import Segment, Timings


class DrawnImage(BaseModel):
    """One image: `b64_json`, or with `response_format: url` a data: URL, and the seed that makes it again."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class _Answer(BaseModel):
    id: str
    model: str
    background: Background
    output_format: OutputFormat
    size: str
    gang_size: int
    exchange: ExchangeMode | Mix
    repairs: int
    warnings: list[str]
    timings: Timings
    segments: list[Segment]


class ImagesResponse(_Answer):
    """The images, how they were made and how many seconds each phase took."""

    created: int
    data: list[DrawnImage]


class _Tokens(BaseModel):
    image_tokens: int = 0
    text_tokens: int = 0


class _Usage(BaseModel):
    """OpenAI's completed event has it; no tokens are counted here."""

    input_tokens: int = 0
    input_tokens_details: _Tokens = _Tokens()
    output_tokens: int = 0
    total_tokens: int = 0


class PartialImageEvent(BaseModel):
    """A small picture of the image after `step`; `size` is this picture's."""

    id: str
    type: Literal["image_generation.partial_image", "image_edit.partial_image"]
    partial_image_index: int
    b64_json: str
    background: Background
    created_at: int
    output_format: OutputFormat
    quality: Literal["auto"] = "auto"
    size: str
    step: int


ProgressState = Literal["queued", "started", "running", "regrouped", "repaired"]


class ProgressEvent(BaseModel):
    """Progress of the request; fields that do not belong to `state` are left out.

    `queued`: `position` requests ahead, `predicted_wait_s` seconds to wait. `started`, `regrouped`: a gang of
    `gang_size` `workers`, rank 0 first, goes on from `step`. `repaired`: `lost_workers` died, another gang
    goes on from `step`. `running`: `step` of `num_steps` are done, `seconds` after the request was accepted.
    """

    id: str
    type: Literal["image_generation.progress", "image_edit.progress"]
    created_at: int
    state: ProgressState
    position: int | None = None
    predicted_wait_s: float | None = None
    step: int | None = None
    num_steps: int | None = None
    gang_size: int | None = None
    workers: tuple[int, ...] | None = None
    lost_workers: tuple[int, ...] | None = None
    seconds: float | None = None


class CompletedEvent(_Answer):
    """The image, and what ImagesResponse says of it."""

    type: Literal["image_generation.completed", "image_edit.completed"]
    b64_json: str
    seed: int
    created_at: int
    quality: Literal["auto"] = "auto"
    usage: _Usage = _Usage()


class ErrorEvent(ErrorResponse):
    """Why the stream ends without an image."""

    type: Literal["error"] = "error"


StreamEvent = PartialImageEvent | ProgressEvent | CompletedEvent | ErrorEvent
