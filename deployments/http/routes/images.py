"""Drawing over HTTP: what is asked for is read, drawn by the service and answered, whole or as a stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import nullcontext
from typing import Any, Literal, TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from deployments.http.answers import error_frame, event_frame, images_response
from deployments.http.body import content_type, read_body
from deployments.http.config import HttpConfig
from deployments.http.disconnect import KEEP_ALIVE, KEEP_ALIVE_S, EventStream, cancel_on_disconnect
from deployments.http.errors import Refusal, log, refusal_of
from deployments.http.form import read_form
from deployments.http.ids import is_of, new_id
from deployments.http.images import EditRequest, ImageRequest, VariationRequest
from deployments.http.openapi import describe_images, errors
from deployments.http.routes.models import card_of
from distriray.errors import DistrirayError
from distriray.events import Event, Finished
from distriray.service import Service
from distriray.wire import EDITS, IMAGES, VARIATIONS, Code

T = TypeVar("T")

DECODED_AT_ONCE = 2
"""Forms whose pictures are looked at together: decoded, each may take four bytes a pixel a few times over."""


class Cancelled(BaseModel):
    """A request that stops after the step it is in; whoever waits for it is answered 503, `cancelled`."""

    id: str
    cancelled: Literal[True] = True


def image_routes(service: Service, config: HttpConfig, cancel: Callable[[str], Awaitable[bool]]) -> APIRouter:
    """Draw, and cancel what is drawn.

    Args:
        cancel: stops a request by its id; whether there was one.
    """
    router, drawing = APIRouter(tags=["images"]), Drawing(service, config)

    @router.post(IMAGES, **_described(ImageRequest, "Draw images of a prompt"))
    async def generate_images(request: Request) -> Response:
        return await drawing.answer(request, _of_json(request, ImageRequest, config))

    @router.post(EDITS, **_described(EditRequest, "Draw on a picture, or fill in a part of it"))
    async def edit_images(request: Request) -> Response:
        return await drawing.answer(request, _with_pictures(request, EditRequest, config))

    @router.post(VARIATIONS, **_described(VariationRequest, "Draw pictures like another"))
    async def vary_images(request: Request) -> Response:
        return await drawing.answer(request, _with_pictures(request, VariationRequest, config))

    @router.delete(
        IMAGES + "/{name}",
        responses=errors(401, 404, 500),
        summary="Cancel what you asked for, by the `id` that its events have",
    )
    async def cancel_images(name: str, request: Request) -> Cancelled:
        if not is_of(name, request.state.owner) or not await cancel(name):
            message = f"you have no unfinished request {name[:200]!r}"
            raise Refusal(404, Code.REQUEST_NOT_FOUND, message, "id")
        return Cancelled(id=name)

    return router


def _described(asked: type[ImageRequest], summary: str) -> dict[str, Any]:
    return {
        "response_class": Response,
        "responses": errors(400, 401, 404, 413, 429, 500, 503),
        "openapi_extra": describe_images(asked),
        "summary": summary,
    }


async def _of_json(request: Request, kind: type[ImageRequest], config: HttpConfig) -> ImageRequest:
    body = await read_body(request, config.max_upload_bytes)
    return await asyncio.to_thread(kind.parse, body)  # it may have pictures, as `data:` URLs


async def _with_pictures(request: Request, kind: type[EditRequest], config: HttpConfig) -> ImageRequest:
    if content_type(request) == "application/json":
        return await _of_json(request, kind, config)
    return await asyncio.to_thread(kind.of_form, await read_form(request, config))  # looks at each file


class Drawing:
    """A service, as it draws for clients of HTTP."""

    def __init__(self, service: Service, config: HttpConfig) -> None:
        self._service, self._config = service, config
        self._decoding = asyncio.Semaphore(DECODED_AT_ONCE)

    async def answer(self, request: Request, reading: Awaitable[ImageRequest]) -> Response:
        """The images, or the stream that ends with one; they are drawn no longer than the client is there.

        Args:
            reading: of the body, which has as much time to come as the images to be drawn.

        Raises:
            DistrirayError, TimeoutError: as the service does; of a stream, before it begins, with its first
                event or after `KEEP_ALIVE_S`.
            ClientDisconnect: the client left.
        """
        timeout_s = self._config.timeout_s
        async with asyncio.timeout(timeout_s):
            asked = await reading
        self._note(request, asked)
        card = card_of(self._service, asked.model)
        name = new_id(request.state.request_id, request.state.owner)
        async with self._decoding if asked.has_pictures else nullcontext():
            generation = await asyncio.to_thread(asked.generation, card, name)
        ends_at = None if timeout_s is None else time.monotonic() + timeout_s
        if not asked.stream:
            work = self._service.generate(generation, give_up_s=timeout_s)
            result = await cancel_on_disconnect(request, _until(ends_at, work))
            body = await asyncio.to_thread(images_response, asked, result)
            return Response(body, media_type="application/json")
        events = self._service.stream(generation, give_up_s=timeout_s)
        frames = _frames(request, asked, events, ends_at)
        try:
            first = await anext(frames)
        except BaseException:
            await events.aclose()
            raise
        return EventStream(frames, events, first)

    def _note(self, request: Request, asked: ImageRequest) -> None:
        noted = request.state.noted
        if asked.user is not None:
            noted["user"] = ascii(asked.user)
        if self._config.log_prompts:
            noted["prompt"] = ascii(asked.prompt)


async def _frames(
    request: Request, asked: ImageRequest, events: AsyncGenerator[Event, None], ends_at: float | None
) -> AsyncGenerator[bytes, None]:
    """What is sent of `events`. The first frame may be empty: it says that the stream has begun.

    Raises:
        Exception: before there is a frame, as the service does; afterwards a frame says it.
        ClientDisconnect: the client left before there was one.
    """
    begun, said_s = False, time.monotonic()
    try:
        while True:
            working = asyncio.ensure_future(_until(ends_at, anext(events, None)))
            try:
                while not working.done():
                    # also where there are events, of which nothing is to be said
                    silence_s = KEEP_ALIVE_S - (time.monotonic() - said_s)
                    await cancel_on_disconnect(request, _wait(working, silence_s))
                    if not working.done():
                        begun = True
                        yield KEEP_ALIVE
                        said_s = time.monotonic()
            finally:
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)
            if (event := working.result()) is None:
                return
            frame = await asyncio.to_thread(event_frame, asked, event)
            if frame or not begun:
                begun = True
                yield frame
                said_s = time.monotonic()
            if isinstance(event, Finished):  # nothing to cancel, and a client need not wait for the end
                await _until(ends_at, anext(events, None))
                return
    except ClientDisconnect:
        if not begun:
            raise
        request.state.noted["code"] = "client_left"
    except Exception as error:
        if not begun:
            raise
        refusal = refusal_of(error)
        request.state.noted["code"] = refusal.code
        if refusal.code == DistrirayError.code:
            log.exception("request %s failed", request.state.request_id)
        yield error_frame(refusal)


async def _wait(working: asyncio.Future[Any], silence_s: float) -> None:
    """Wait for `working`, but not in silence for too long."""
    await asyncio.wait([working], timeout=max(0.0, silence_s))


async def _until(ends_at: float | None, work: Awaitable[T]) -> T:
    left_s = None if ends_at is None else ends_at - time.monotonic()
    async with asyncio.timeout(left_s):
        return await work
