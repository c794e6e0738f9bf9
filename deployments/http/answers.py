"""Results and events as bytes to send. Pictures take milliseconds to encode: call these in a thread."""

from __future__ import annotations

import time
from typing import Any

from deployments.http.encode import background, data_url, encode
from deployments.http.errors import Refusal
from deployments.http.images import ImageRequest
from deployments.http.responses import (
    CompletedEvent,
    DrawnImage,
    ErrorEvent,
    ImagesResponse,
    PartialImageEvent,
    ProgressEvent,
    ProgressState,
    StreamEvent,
)
from distriray.events import Event, Finished, Preview, Queued, Regrouped, Repaired, Started, Step
from distriray.results import GenerationResult


def images_response(asked: ImageRequest, result: GenerationResult) -> bytes:
    """The body of the answer: JSON of ImagesResponse."""
    encoded = [encode(image, asked.format, asked.compression) for image in result.images]
    if asked.response_format == "url":
        data = [
            DrawnImage(url=data_url(text, asked.format), seed=seed)
            for text, seed in zip(encoded, result.seeds, strict=True)
        ]
    else:
        data = [
            DrawnImage(b64_json=text, seed=seed) for text, seed in zip(encoded, result.seeds, strict=True)
        ]
    response = ImagesResponse(created=_now(), data=data, **_about(asked, result))
    return response.model_dump_json(exclude_none=True).encode()


def event_frame(asked: ImageRequest, event: Event) -> bytes:
    """`event` as a server-sent event; empty for what was not asked for."""
    match event:
        case Preview():
            width, height = event.image.size
            return _frame(
                PartialImageEvent(
                    type=_type(asked, "partial_image"),
                    id=event.request_id,
                    partial_image_index=event.index,
                    b64_json=encode(event.image, asked.format, asked.compression),
                    created_at=_now(),
                    background=background(event.image, asked.format),
                    output_format=asked.format,
                    size=f"{width}x{height}",
                    step=event.step,
                )
            )
        case Finished(result=result):
            return _frame(
                CompletedEvent(
                    type=_type(asked, "completed"),
                    b64_json=encode(result.images[0], asked.format, asked.compression),
                    seed=result.seeds[0],
                    created_at=_now(),
                    **_about(asked, result),
                )
            )
        case _ if not asked.progress:
            return b""
        case Queued():
            wait = event.predicted_wait_s
            return _progress(asked, event, "queued", position=event.position, predicted_wait_s=wait)
        case Started():
            return _progress(
                asked, event, "started", gang_size=len(event.workers), workers=event.workers, step=0
            )
        case Step():
            return _progress(
                asked,
                event,
                "running",
                step=event.step,
                num_steps=event.num_steps,
                gang_size=event.gang_size,
                seconds=event.seconds,
            )
        case Regrouped():
            workers = event.workers
            return _progress(
                asked, event, "regrouped", gang_size=len(workers), workers=workers, step=event.step
            )
        case Repaired():
            return _progress(asked, event, "repaired", lost_workers=event.lost_workers, step=event.step)


def _type(asked: ImageRequest, event: str) -> Any:
    """OpenAI's name of that event of such a request."""
    return f"{asked.EVENTS}.{event}"


def error_frame(refusal: Refusal) -> bytes:
    """The last frame of a stream that cannot be finished."""
    return _frame(ErrorEvent(error=refusal.error))


def _about(asked: ImageRequest, result: GenerationResult) -> dict[str, Any]:
    backgrounds = {background(image, asked.format) for image in result.images}
    return {
        "id": result.id,
        "model": result.model,
        "background": max(backgrounds),  # transparent, if any of them is
        "output_format": asked.format,
        "size": f"{result.width}x{result.height}",
        "gang_size": result.gang_size,
        "exchange": result.exchange,
        "repairs": result.repairs,
        "warnings": result.warnings,
        "timings": result.timings,
        "segments": result.segments,
    }


def _progress(asked: ImageRequest, event: Event, state: ProgressState, **fields: Any) -> bytes:
    return _frame(
        ProgressEvent(
            type=_type(asked, "progress"), id=event.request_id, state=state, created_at=_now(), **fields
        )
    )


def _frame(event: StreamEvent) -> bytes:
    # An error's `param` is null where there is none; the other events leave out what they do not have.
    data = event.model_dump_json(exclude_none=not isinstance(event, ErrorEvent))
    return f"event: {event.type}\ndata: {data}\n\n".encode()


def _now() -> int:
    return int(time.time())
