"""The service over HTTP, for Python programs anywhere; `handle` is for those on its Ray cluster."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import httpx
from httpx_sse import EventSource

from distriray.errors import NotAllowed
from distriray.events import Event, Finished
from distriray.requests import GenerationRequest
from distriray.results import GenerationResult
from distriray.service import Fleet, ModelCard
from distriray.wire import (
    IMAGES,
    Code,
    decode_cards,
    decode_error,
    decode_event,
    decode_result,
    encode_headers,
    encode_request,
    not_the_service,
)

T = TypeVar("T")

KEY_VARIABLE = "DISTRIRAY_API_KEY"

_CONNECT_S = 10.0


class Client:
    """Asks a service for pictures.

    A request is a `GenerationRequest`, or a prompt with its other fields as keywords. Results, events and
    errors of `distriray.errors` are those of a host or a handle. Besides these, every method raises
    NotAllowed without the right key, ConnectionError when the service cannot be reached or breaks off, and
    TimeoutError. Leaving early, as with Ctrl-C or by closing a stream, cancels the request.

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
        wanted = GenerationRequest.of(request, fields)
        call, headers = encode_request(wanted, stream=False), encode_headers(wanted)
        return self._ask(lambda answer: decode_result(answer.json()), method="POST", headers=headers, **call)

    def stream(self, request: GenerationRequest | str, **fields: Any) -> Generator[Event, None, None]:
        """The events of a request for one image, ending with `Finished`."""
        wanted = GenerationRequest.of(request, fields)
        call, headers, finished = encode_request(wanted, stream=True), encode_headers(wanted), False
        with _errors_of(self._http), self._http.stream("POST", headers=headers, **call) as answer:
            if not answer.is_success:
                answer.read()
                raise decode_error(answer)
            for frame in EventSource(answer).iter_sse():  # to its end, which comes after the last event
                event = decode_event(frame)
                finished |= isinstance(event, Finished)
                yield event
        if not finished:
            raise _broken_off(wanted)

    def cancel(self, request_id: str) -> bool:
        """Stop a request of one's own, by the id that its events have; whether there was one."""
        with _errors_of(self._http):
            return _was_there(self._http.delete(f"{IMAGES}/{request_id}"))

    def models(self) -> list[ModelCard]:
        """The models on offer; the first is the default."""
        return self._ask(lambda answer: decode_cards(answer.json()), url="/v1/models")

    def fleet(self) -> Fleet:
        """Every pool with its hosts, gangs and queues."""
        return self._ask(lambda answer: Fleet.model_validate_json(answer.content), url="/v1/fleet")

    def _ask(self, read: Callable[[httpx.Response], T], *, method: str = "GET", **call: Any) -> T:
        with _errors_of(self._http):
            return _read(self._http.request(method, **call), read)


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
        wanted = GenerationRequest.of(request, fields)
        call, headers = encode_request(wanted, stream=False), encode_headers(wanted)
        return await self._ask(
            lambda answer: decode_result(answer.json()), method="POST", headers=headers, **call
        )

    async def stream(self, request: GenerationRequest | str, **fields: Any) -> AsyncGenerator[Event, None]:
        """The events of a request for one image, ending with `Finished`."""
        wanted = GenerationRequest.of(request, fields)
        call, headers, finished = encode_request(wanted, stream=True), encode_headers(wanted), False
        with _errors_of(self._http):
            async with self._http.stream("POST", headers=headers, **call) as answer:
                if not answer.is_success:
                    await answer.aread()
                    raise decode_error(answer)
                async for frame in EventSource(answer).aiter_sse():
                    event = decode_event(frame)
                    finished |= isinstance(event, Finished)
                    yield event
        if not finished:
            raise _broken_off(wanted)

    async def cancel(self, request_id: str) -> bool:
        """Stop a request of one's own, by the id that its events have; whether there was one."""
        with _errors_of(self._http):
            return _was_there(await self._http.delete(f"{IMAGES}/{request_id}"))

    async def models(self) -> list[ModelCard]:
        """The models on offer; the first is the default."""
        return await self._ask(lambda answer: decode_cards(answer.json()), url="/v1/models")

    async def fleet(self) -> Fleet:
        """Every pool with its hosts, gangs and queues."""
        return await self._ask(lambda answer: Fleet.model_validate_json(answer.content), url="/v1/fleet")

    async def _ask(self, read: Callable[[httpx.Response], T], *, method: str = "GET", **call: Any) -> T:
        with _errors_of(self._http):
            return _read(await self._http.request(method, **call), read)


def _options(url: str, api_key: str | None, timeout_s: float | None) -> dict[str, Any]:
    key = api_key or os.environ.get(KEY_VARIABLE, "")
    if key != key.strip() or not key.isprintable():  # which httpx would quote, key and all
        given = "api_key" if api_key else f"the environment variable {KEY_VARIABLE}"
        raise NotAllowed(f"{given} has a blank at an end, or the end of a line; give the key alone")
    return {
        "base_url": url,
        "headers": {"Authorization": f"Bearer {key}".encode()} if key else {},
        "timeout": httpx.Timeout(timeout_s, connect=_CONNECT_S),
        "limits": httpx.Limits(max_connections=None),  # what waits, waits where its deadline is known
    }


def _read(answer: httpx.Response, read: Callable[[httpx.Response], T]) -> T:
    if not answer.is_success:
        raise decode_error(answer)
    try:
        return read(answer)
    except (ValueError, KeyError, TypeError) as error:
        raise not_the_service(answer) from error


def _was_there(answer: httpx.Response) -> bool:
    if answer.status_code == httpx.codes.NOT_FOUND and Code.REQUEST_NOT_FOUND in answer.text:
        return False
    return _read(answer, lambda _: True)


@contextmanager
def _errors_of(http: httpx.Client | httpx.AsyncClient) -> Iterator[None]:
    try:
        yield
    except httpx.TimeoutException as error:
        raise TimeoutError(f"{http.base_url} did not answer in time") from error
    except httpx.TransportError as error:
        raise ConnectionError(f"{http.base_url} cannot be reached, or broke off: {error}") from error


def _broken_off(request: GenerationRequest) -> ConnectionError:
    return ConnectionError(f"the service broke off before request {request.id} was finished")
