"""The service over HTTP, for Python programs anywhere; `handle` is for those on its Ray cluster."""

from __future__ import annotations

import os
import re
from base64 import b64decode
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any, Self

import httpx
from httpx_sse import EventSource, ServerSentEvent
from PIL import Image

from .errors import (
    DeadlineUnmet,
    DistrirayError,
    GangBroken,
    GenerationCancelled,
    InvalidRequest,
    ModelNotFound,
    NotAllowed,
    NotEnoughDevices,
    QueueFull,
)
from .gang.events import Event, Finished, Preview, Queued, Regrouped, Repaired, Started, Step
from .requests import GenerationRequest, GenerationResult
from .service import Fleet, ModelCard

KEY_VARIABLE = "DISTRIRAY_API_KEY"

_IMAGES = "/v1/images/generations"
_PLAIN = (
    *("prompt", "model", "negative_prompt", "seed", "num_inference_steps", "guidance_scale"),
    *("scheduler", "gang_size", "deadline_s"),
)
"""Fields that are called the same over HTTP."""
_NOT_CARRIED = ("guidance_rescale", "priority", "parallel")
_PARAMS = {"n": "num_images", "partial_images": "previews"}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CONNECT_S = 10.0


class Client:
    """Asks a service for pictures.

    A request is a `GenerationRequest`, or a prompt with its other fields as keywords. What comes back, and
    the errors of `distriray.errors` that are raised, are those of a host or a handle. Besides them every
    method raises NotAllowed without the right key, ConnectionError when the service cannot be reached or
    breaks off, and TimeoutError. To leave early, as with Ctrl-C or by closing a stream, cancels the request.

        with Client("http://localhost:8000") as client:
            client.generate("a lake at dawn", num_inference_steps=20).images[0].save("lake.png")

    Args:
        url: of the service, without a path.
        api_key: by default the environment variable DISTRIRAY_API_KEY.
        timeout_s: how long to wait for the next byte; None waits as long as the service does.
    """

    def __init__(self, url: str, api_key: str | None = None, *, timeout_s: float | None = None) -> None:
        self._http = httpx.Client(**_options(url, api_key, timeout_s))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def generate(self, request: GenerationRequest | str, **fields: Any) -> GenerationResult:
        """The images of a request, without loss."""
        wanted = settled(request, fields)
        with _errors_of(self._http):
            return _result(self._ask("POST", _IMAGES, json=_body(wanted), headers=_headers(wanted)).json())

    def stream(self, request: GenerationRequest | str, **fields: Any) -> Generator[Event, None, None]:
        """What happens to a request for one image, ending with `Finished`."""
        wanted = settled(request, fields)
        body, headers = _streamed(wanted), _headers(wanted)
        with _errors_of(self._http), self._http.stream("POST", _IMAGES, json=body, headers=headers) as answer:
            if not answer.is_success:
                answer.read()
                raise _error_of(answer)
            for frame in EventSource(answer).iter_sse():
                event = _event(frame)
                yield event
                if isinstance(event, Finished):
                    return
        raise _broken_off(wanted)

    def models(self) -> list[ModelCard]:
        """What can be asked for; the first is drawn by whoever names none."""
        with _errors_of(self._http):
            return _cards(self._ask("GET", "/v1/models").json())

    def fleet(self) -> Fleet:
        """Every pool with its hosts, gangs and queues."""
        with _errors_of(self._http):
            return Fleet.model_validate_json(self._ask("GET", "/v1/fleet").content)

    def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        answer = self._http.request(method, path, **options)
        if not answer.is_success:
            raise _error_of(answer)
        return answer


class AsyncClient:
    """`Client` for an event loop."""

    def __init__(self, url: str, api_key: str | None = None, *, timeout_s: float | None = None) -> None:
        self._http = httpx.AsyncClient(**_options(url, api_key, timeout_s))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def generate(self, request: GenerationRequest | str, **fields: Any) -> GenerationResult:
        """The images of a request, without loss. Cancelling this coroutine cancels the request."""
        wanted = settled(request, fields)
        with _errors_of(self._http):
            answer = await self._ask("POST", _IMAGES, json=_body(wanted), headers=_headers(wanted))
        return _result(answer.json())

    async def stream(self, request: GenerationRequest | str, **fields: Any) -> AsyncGenerator[Event, None]:
        """What happens to a request for one image, ending with `Finished`."""
        wanted = settled(request, fields)
        body, headers = _streamed(wanted), _headers(wanted)
        with _errors_of(self._http):
            async with self._http.stream("POST", _IMAGES, json=body, headers=headers) as answer:
                if not answer.is_success:
                    await answer.aread()
                    raise _error_of(answer)
                async for frame in EventSource(answer).aiter_sse():
                    event = _event(frame)
                    yield event
                    if isinstance(event, Finished):
                        return
        raise _broken_off(wanted)

    async def models(self) -> list[ModelCard]:
        """What can be asked for; the first is drawn by whoever names none."""
        with _errors_of(self._http):
            return _cards((await self._ask("GET", "/v1/models")).json())

    async def fleet(self) -> Fleet:
        """Every pool with its hosts, gangs and queues."""
        with _errors_of(self._http):
            return Fleet.model_validate_json((await self._ask("GET", "/v1/fleet")).content)

    async def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        answer = await self._http.request(method, path, **options)
        if not answer.is_success:
            raise _error_of(answer)
        return answer


def settled(request: GenerationRequest | str, fields: dict[str, Any]) -> GenerationRequest:
    """The request that a client's caller means.

    Raises:
        TypeError: `fields` beside a whole request.
        InvalidRequest: it is none.
    """
    if isinstance(request, GenerationRequest):
        if fields:
            raise TypeError(f"{sorted(fields)} belong into the GenerationRequest that was given")
        return request
    return GenerationRequest.parse({"prompt": request, **fields})


def _options(url: str, api_key: str | None, timeout_s: float | None) -> dict[str, Any]:
    key = api_key or os.environ.get(KEY_VARIABLE)
    return {
        "base_url": url,
        "headers": {"Authorization": f"Bearer {key}"} if key else {},
        "timeout": httpx.Timeout(timeout_s, connect=_CONNECT_S),
    }


@contextmanager
def _errors_of(http: httpx.Client | httpx.AsyncClient) -> Iterator[None]:
    try:
        yield
    except httpx.TimeoutException as error:
        raise TimeoutError(f"{http.base_url} did not answer in time") from error
    except httpx.TransportError as error:
        raise ConnectionError(f"{http.base_url} cannot be reached, or broke off: {error}") from error


def _headers(request: GenerationRequest) -> dict[str, str]:
    if not _REQUEST_ID.fullmatch(request.id):
        message = f"id {request.id!r}: over HTTP it is of up to 64 letters, digits, '.', '_' and '-'"
        raise InvalidRequest(message, "id")
    return {"X-Request-ID": request.id}


def _body(request: GenerationRequest) -> dict[str, Any]:
    for name in _NOT_CARRIED:
        if getattr(request, name) != GenerationRequest.model_fields[name].default:
            raise InvalidRequest(f"{name} is not carried over HTTP; a HandleClient can ask for it", name)
    if (request.height is None) != (request.width is None):
        raise InvalidRequest("over HTTP a size is a height and a width, or neither", "height")
    body = {name: getattr(request, name) for name in _PLAIN}
    body["n"] = request.num_images
    if request.height is not None:
        body["size"] = f"{request.width}x{request.height}"
    if request.previews:
        body["partial_images"] = request.previews
    return {name: value for name, value in body.items() if value is not None}


def _streamed(request: GenerationRequest) -> dict[str, Any]:
    return {**_body(request), "stream": True, "progress": True}


def _picture(encoded: str) -> Image.Image:
    image = Image.open(BytesIO(b64decode(encoded)))
    image.load()
    return image


def _result(answer: dict[str, Any]) -> GenerationResult:
    drawn = answer.get("data", [answer])  # an event is its own only image
    width, height = map(int, answer["size"].split("x"))
    return GenerationResult(
        **{name: answer[name] for name in ("id", "model", "timings", "segments", "repairs")},
        height=height,
        width=width,
        seeds=[image["seed"] for image in drawn],
        images=[_picture(image["b64_json"]) for image in drawn],
    )


def _event(frame: ServerSentEvent) -> Event:
    data: dict[str, Any] = frame.json()
    match data:
        case {"type": "error", "error": error}:
            raise _error(error)
        case {"type": "image_generation.completed", "id": name}:
            return Finished(name, _result(data))
        case {"type": "image_generation.partial_image", "id": name, "step": step}:
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
    raise DistrirayError(f"the service streamed an event that this version does not know: {frame.event!r}")


def _cards(answer: dict[str, Any]) -> list[ModelCard]:
    cards = []
    for model in answer["data"]:
        width, height = map(int, model["default_size"].split("x"))
        cards.append(ModelCard.model_validate({**model, "default_size": (height, width)}))
    return cards


def _error_of(answer: httpx.Response) -> Exception:
    try:
        error = answer.json()["error"]
        return _error(error, float(answer.headers.get("Retry-After", 1.0)))
    except (ValueError, KeyError, TypeError):  # not the service but something on the way to it
        return DistrirayError(f"{answer.url} answered {answer.status_code}: {answer.text[:200]!r}")


def _error(error: dict[str, Any], retry_after_s: float = 1.0) -> Exception:
    message, code, param = error["message"], error["code"], error["param"]
    match code:
        case "queue_full":
            return QueueFull(message, retry_after_s)
        case "deadline_unmet":
            return DeadlineUnmet(message, error.get("possible_s"))
        case "model_not_found":
            return ModelNotFound(message)
        case "cancelled":
            return GenerationCancelled(message)
        case "gang_broken":
            return GangBroken(message)
        case "unavailable":
            return NotEnoughDevices(message)
        case "timeout":
            return TimeoutError(message)
        case "missing_api_key" | "invalid_api_key" | "keys_not_configured":
            return NotAllowed(message)
    if error["type"] == "invalid_request_error":
        return InvalidRequest(message, _PARAMS.get(param, param))
    return DistrirayError(message)


def _broken_off(request: GenerationRequest) -> ConnectionError:
    return ConnectionError(f"the service broke off before request {request.id} was finished")
