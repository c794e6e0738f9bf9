"""The wire format: requests, results, events and errors as JSON over HTTP, and the names they have there."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from collections.abc import Mapping
from enum import StrEnum
from io import BytesIO
from typing import Any

import httpx
from httpx_sse import ServerSentEvent
from PIL import Image

from distriray.errors import DeadlineUnmet, DistrirayError, InvalidRequest, NotAllowed, QueueFull
from distriray.events import Event, Finished, Preview, Queued, Regrouped, Repaired, Started, Step
from distriray.requests import GenerationRequest
from distriray.results import GenerationResult
from distriray.service import ModelCard

IMAGES, EDITS, VARIATIONS = (f"/v1/images/{name}" for name in ("generations", "edits", "variations"))
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""The form of an X-Request-ID."""


class Code(StrEnum):
    """The codes of what goes wrong over HTTP alone; every other error has its own in `errors`."""

    MISSING_PARAMETER = "missing_required_parameter"
    UNKNOWN_PARAMETER = "unknown_parameter"
    INVALID_JSON = "invalid_json"
    UNSUPPORTED_CONTENT_TYPE = "unsupported_content_type"
    INVALID_FORM = "invalid_form"
    MISSING_KEY = "missing_api_key"
    INVALID_KEY = "invalid_api_key"
    NO_KEYS = "keys_not_configured"
    REQUEST_NOT_FOUND = "request_not_found"
    UNKNOWN_URL = "unknown_url"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    BODY_TOO_LARGE = "body_too_large"
    TOO_MANY_WATCHERS = "too_many_watchers"
    TIMEOUT = "timeout"


PARAMS = {"num_images": "n", "previews": "partial_images", "height": "size", "width": "size"}
"""HTTP names of the fields of a GenerationRequest that are called otherwise there."""

_NOT_CARRIED = ("priority", "parallel")
CARRIED = GenerationRequest.model_fields.keys() - {"id", *_NOT_CARRIED}
"""The fields of a GenerationRequest that an HTTP body has; the id is a header."""
OF_PICTURES = ("image", "mask_image", "strength")
"""Those of a picture to draw on: `EDITS` takes them, `IMAGES` does not, and `VARIATIONS` all but a mask."""
_FIELDS = {param: field for field, param in reversed(PARAMS.items())}  # of two, the first
_KINDS = {kind.code: kind for kind in DistrirayError.__subclasses__() if "code" in vars(kind)}


def encode_fields(request: GenerationRequest) -> dict[str, Any]:
    """A request's fields by their HTTP names, without pictures and what is None."""
    carried = CARRIED - request.pictures.keys()
    fields = request.model_dump(mode="json", include=set(carried), exclude_none=True)
    height, width = fields.pop("height", None), fields.pop("width", None)
    if height is not None and width is not None:
        fields["size"] = f"{width}x{height}"
    return {PARAMS.get(name, name): value for name, value in fields.items()}


def decode_fields(params: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a GenerationRequest among those of an HTTP body; the inverse of `encode_fields`."""
    fields = {_FIELDS.get(param, param): value for param, value in params.items() if param != "size"}
    if params.get("size", "auto") != "auto":
        fields["width"], fields["height"] = map(int, params["size"].split("x"))
    return {name: value for name, value in fields.items() if name in CARRIED}


def encode_headers(request: GenerationRequest) -> dict[str, str]:
    """The headers that carry a request's id; raises InvalidRequest where it does not fit."""
    if not REQUEST_ID.fullmatch(request.id):
        message = f"id {request.id!r}: over HTTP use at most 64 letters, digits, '.', '_' and '-'"
        raise InvalidRequest(message, "id")
    return {"X-Request-ID": request.id}


def encode_request(request: GenerationRequest, stream: bool) -> dict[str, Any]:
    """Path and body of a request to post, as httpx's arguments: JSON, or a form where it has pictures.

    Raises:
        InvalidRequest: it has a field that HTTP does not carry.
    """
    for name in _NOT_CARRIED:
        if getattr(request, name) != GenerationRequest.model_fields[name].default:
            raise InvalidRequest(f"{name} is not carried over HTTP; a HandleClient can ask for it", name)
    if (request.height is None) != (request.width is None):
        raise InvalidRequest("over HTTP a size is a height and a width, or neither", "height")
    if stream and request.num_images > 1:
        message = f"num_images {request.num_images}: over HTTP a stream makes one image"
        raise InvalidRequest(message, "num_images")
    if request.previews and not stream:
        raise InvalidRequest(f"previews {request.previews}: only a stream carries them", "previews")
    if request.image is None and request.mask_image is not None:  # a form calls `image` what that is of
        first, *others = request.references
        request = request.model_copy(update={"image": first.image, "references": tuple(others)})
    body = encode_fields(request)
    if stream:
        body |= {"stream": True, "progress": True}
    if request.image is None:
        return {"url": IMAGES, "json": body}
    for field in GenerationRequest.WITH_IMAGES:
        for entry in body[field]:
            del entry["image"]
    files = {
        name: (f"{name}.{picture.format}", picture.data, f"image/{picture.format}")
        for name, picture in request.pictures.items()
    }
    # Of a list httpx would make several fields; a form has it as the JSON that it is.
    form = {name: json.dumps(value) if isinstance(value, list) else value for name, value in body.items()}
    # An edit without a mask takes what is transparent for one, and needs a prompt.
    return {"url": VARIATIONS if request.mask_image is None else EDITS, "data": form, "files": files}


def _picture(encoded: str) -> Image.Image:
    image = Image.open(BytesIO(b64decode(encoded)))
    image.load()
    return image


def decode_result(answer: dict[str, Any]) -> GenerationResult:
    """The result in an answer, or in the event that completes a stream."""
    drawn = answer.get("data", [answer])  # an event is its own only image
    width, height = map(int, answer["size"].split("x"))
    return GenerationResult(
        **{name: answer[name] for name in ("id", "model", "timings", "segments", "repairs", "warnings")},
        height=height,
        width=width,
        seeds=[image["seed"] for image in drawn],
        images=[_picture(image["b64_json"]) for image in drawn],
    )


def decode_event(frame: ServerSentEvent) -> Event:
    """The event in a server-sent event; raises the error that it is."""
    try:
        return _event(frame.json())
    except DistrirayError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise DistrirayError(
            f"the service streamed {frame.event!r}, which this version cannot read: {frame.data[:200]!r}"
        ) from error


def _event(data: dict[str, Any]) -> Event:
    match data:
        case {"type": "error", "error": error}:
            raise _error(error)
        case {"type": "image_generation.completed" | "image_edit.completed", "id": name}:
            return Finished(name, decode_result(data))
        case {"partial_image_index": _, "id": name, "step": step}:
            return Preview(name, step, data["partial_image_index"], _picture(data["b64_json"]))
        case {"state": "queued", "id": name}:
            return Queued(name, data["position"], data["predicted_wait_s"])
        case {"state": "started", "id": name}:
            return Started(name, tuple(data["workers"]))
        case {"state": "running", "id": name, "step": step}:
            return Step(name, step, data["num_steps"], data["gang_size"], data["seconds"])
        case {"state": "regrouped", "id": name, "step": step}:
            return Regrouped(name, tuple(data["workers"]), step)
        case {"state": "repaired", "id": name, "step": step}:
            return Repaired(name, tuple(data["lost_workers"]), step)
    raise ValueError(data["type"])


def decode_cards(answer: dict[str, Any]) -> list[ModelCard]:
    """The models of GET /v1/models."""
    cards = []
    for model in answer["data"]:
        size = model["default_size"] and tuple(map(int, reversed(model["default_size"].split("x"))))
        cards.append(ModelCard.model_validate({**model, "default_size": size}))
    return cards


def decode_error(answer: httpx.Response) -> Exception:
    """The error in an answer that is no success.

    For a service that is not there, or that died over the request, a proxy answers, with a status of 5xx.
    """
    try:
        error = answer.json()["error"]
        return _error(error, _seconds(answer.headers.get("Retry-After")))
    except (ValueError, KeyError, TypeError):
        other = not_the_service(answer)
    return (
        ConnectionError(f"{other}; the service cannot be reached, or broke off")
        if answer.is_server_error
        else other
    )


def not_the_service(answer: httpx.Response) -> DistrirayError:
    """The error for an answer of another program, or of something on the way."""
    return DistrirayError(f"{answer.url} answered {answer.status_code}: {answer.text[:200]!r}")


def _seconds(text: str | None) -> float:
    try:
        return float(text or 1.0)
    except ValueError:  # a date
        return 1.0


def _error(error: dict[str, Any], retry_after_s: float = 1.0) -> Exception:
    message, code, param = error["message"], error["code"], error["param"]
    match code:
        case QueueFull.code:
            return QueueFull(message, retry_after_s)
        case DeadlineUnmet.code:
            return DeadlineUnmet(message, error.get("possible_s"))
        case Code.TIMEOUT:
            return TimeoutError(message)
        case Code.MISSING_KEY | Code.INVALID_KEY | Code.NO_KEYS:
            return NotAllowed(message)
        case Code.UNKNOWN_URL | Code.METHOD_NOT_ALLOWED:
            return DistrirayError(f"{message}; check that the client's URL is the service's, without a path")
    other = InvalidRequest if error["type"] == "invalid_request_error" else DistrirayError
    kind = _KINDS.get(code, other)
    return InvalidRequest(message, _FIELDS.get(param, param)) if kind is InvalidRequest else kind(message)
