"""The application: OpenAI's Images API over a service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import nullcontext
from typing import Any, Literal, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from distriray.errors import DistrirayError, ModelNotFound, NotEnoughDevices
from distriray.events import Event, Finished
from distriray.limits import Limits
from distriray.requests import Defaults
from distriray.service import Fleet, ModelCard, Service
from distriray.wire import Code

from .access_log import RequestIdAndLog
from .answers import error_frame, event_frame, images_response
from .auth import require_key
from .body import content_type, read_body
from .config import HttpConfig
from .disconnect import EventStream, cancel_on_disconnect
from .errors import Refusal, answer_errors, log, refusal_of
from .form import read_form
from .head import HeadAsGet
from .health import Health
from .ids import is_of, new_id
from .images import EditRequest, ImageRequest, VariationRequest
from .openapi import describe_images, describe_watch, document, errors
from .paths import TrailingSlash
from .site import add_page
from .watch import Watch

T = TypeVar("T")

DECODED_AT_ONCE = 2
"""Forms whose pictures are looked at together: decoded, each may take four bytes a pixel a few times over."""


class Model(BaseModel):
    """A model; beside OpenAI's fields its own size (`WxH`, null until a host was up), the unit of all sizes,
    its limits, the gangs that can draw it, the fields that it refuses and why, what it is drawn with unless a
    request says otherwise, the adapters, ControlNets and IP-Adapters that requests may name, and the model
    that this is another name of, or null."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    default_size: str | None
    size_unit: int
    limits: Limits
    gang_sizes: tuple[int, ...]
    lacks: dict[str, str]
    defaults: Defaults
    loras: tuple[str, ...]
    controls: tuple[str, ...]
    ip_adapters: tuple[str, ...]
    alias_of: str | None


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Cancelled(BaseModel):
    """A request that stops after the step it is in; whoever waits for it is answered 503, `cancelled`."""

    id: str
    cancelled: Literal[True] = True


class Healthy(BaseModel):
    """A request that came now could be served."""

    status: Literal["ok"] = "ok"


def build_http(
    service: Service, config: HttpConfig, cancel: Callable[[str], Awaitable[bool]] | None = None
) -> FastAPI:
    """OpenAI's Images API over `service`.

    Args:
        cancel: stops a request of any router's, where `service.cancel` is one router's.

    Raises:
        ValueError, OSError: the keys cannot be had; see `HttpConfig.keys`.
    """
    app = FastAPI(redirect_slashes=False, redoc_url=None)
    app.openapi = document(app, service)  # type: ignore[method-assign]
    app.add_middleware(HeadAsGet)
    app.add_middleware(TrailingSlash)
    app.add_middleware(RequestIdAndLog)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=(
                "*",
            ),  # browsers name those of the client's own, and no cookie opens anything here
            expose_headers=("X-Request-ID", "Retry-After", "X-Should-Retry"),
        )
    answer_errors(app)
    health, watch = Health(service), Watch(service)
    decoding = asyncio.Semaphore(DECODED_AT_ONCE)
    allowed = Depends(require_key(config))

    def images(asked: type[ImageRequest], summary: str) -> dict[str, Any]:
        return {
            "dependencies": [allowed],
            "response_class": Response,
            "responses": errors(400, 401, 404, 413, 429, 500, 503),
            "openapi_extra": describe_images(asked),
            "summary": summary,
            "tags": ["images"],
        }

    async def parsed(request: Request, kind: type[ImageRequest]) -> ImageRequest:
        body = await read_body(request, config.max_upload_bytes)
        return await asyncio.to_thread(kind.parse, body)  # it may have pictures, as `data:` URLs

    async def read(request: Request, kind: type[EditRequest]) -> ImageRequest:
        if content_type(request) == "application/json":
            return await parsed(request, kind)
        return kind.of_form(await read_form(request, config))

    @app.post("/v1/images/generations", **images(ImageRequest, "Draw images of a prompt"))
    async def generate_images(request: Request) -> Response:
        return await draw(request, await parsed(request, ImageRequest))

    @app.post("/v1/images/edits", **images(EditRequest, "Draw on a picture, or fill in a part of it"))
    async def edit_images(request: Request) -> Response:
        return await draw(request, await read(request, EditRequest))

    @app.post("/v1/images/variations", **images(VariationRequest, "Draw pictures like another"))
    async def vary_images(request: Request) -> Response:
        return await draw(request, await read(request, VariationRequest))

    @app.delete(
        "/v1/images/generations/{name}",
        dependencies=[allowed],
        responses=errors(401, 404, 500),
        summary="Cancel what you asked for, by the `id` that its events have",
        tags=["images"],
    )
    async def cancel_images(name: str, request: Request) -> Cancelled:
        if not is_of(name, request.state.owner) or not await (cancel or service.cancel)(name):
            raise Refusal(404, Code.REQUEST_NOT_FOUND, f"you have no unfinished request {name[:200]!r}", "id")
        return Cancelled(id=name)

    async def draw(request: Request, asked: ImageRequest) -> Response:
        _note(request, asked, config)
        card = _card(service, asked.model)
        name = new_id(request.state.request_id, request.state.owner)
        async with decoding if asked.has_pictures else nullcontext():
            generation = await asyncio.to_thread(asked.generation, card.id, name, card.limits)
        ends_at = None if config.timeout_s is None else time.monotonic() + config.timeout_s
        if not asked.stream:
            work = service.generate(generation, give_up_s=config.timeout_s)
            result = await cancel_on_disconnect(request, _until(ends_at, work))
            body = await asyncio.to_thread(images_response, asked, result)
            return Response(body, media_type="application/json")
        events = service.stream(generation, give_up_s=config.timeout_s)
        try:
            first = await cancel_on_disconnect(request, _until(ends_at, anext(events)))
        except BaseException:
            await events.aclose()
            raise
        return EventStream(_frames(request, asked, first, events, ends_at), events)

    @app.get(
        "/v1/models",
        dependencies=[allowed],
        responses=errors(401, 500),
        summary="All models",
        tags=["models"],
    )
    async def list_models() -> ModelList:
        return ModelList(data=[_model(card) for card in service.models()])

    @app.get(
        "/v1/models/{model:path}",
        dependencies=[allowed],
        responses=errors(401, 404, 500),
        summary="One model",
        tags=["models"],
    )
    async def retrieve_model(model: str) -> Model:
        return _model(_card(service, model))

    @app.get(
        "/v1/fleet",
        dependencies=[allowed],
        responses=errors(401, 500, 503),
        summary="Hosts, gangs, queues and predicted waits",
        tags=["fleet"],
    )
    async def get_fleet() -> Fleet:
        return await service.fleet()

    @app.get(
        "/v1/fleet/events",
        dependencies=[allowed],
        response_class=Response,
        responses=errors(401, 429, 500),
        openapi_extra=describe_watch(),
        summary="What happens in the fleet, as it happens",
        tags=["fleet"],
    )
    async def watch_fleet(request: Request) -> Response:
        if request.state.head:
            return Response(media_type="text/event-stream")
        watcher = watch.join()
        return EventStream(watcher.frames(request), watcher)

    @app.get("/healthz", responses=errors(503), summary="Whether a request could be served", tags=["fleet"])
    async def get_health() -> Healthy:
        try:
            await health.check()
        except DistrirayError as error:
            raise NotEnoughDevices(str(error)) from error
        return Healthy()

    if config.page:
        add_page(app)
    return app


async def _frames(
    request: Request,
    asked: ImageRequest,
    first: Event,
    events: AsyncGenerator[Event, None],
    ends_at: float | None,
) -> AsyncGenerator[bytes, None]:
    event: Event | None = first
    try:
        while event is not None:
            if frame := await asyncio.to_thread(event_frame, asked, event):
                yield frame
            coming = _until(ends_at, anext(events, None))
            # After the last event there is nothing to cancel, and a client need not wait for the end.
            event = await (coming if isinstance(event, Finished) else cancel_on_disconnect(request, coming))
    except ClientDisconnect:
        request.state.noted["code"] = "client_left"
    except Exception as error:
        refusal = refusal_of(error)
        request.state.noted["code"] = refusal.code
        if refusal.code == DistrirayError.code:
            log.exception("request %s failed", request.state.request_id)
        yield error_frame(refusal)


async def _until(ends_at: float | None, work: Awaitable[T]) -> T:
    left_s = None if ends_at is None else ends_at - time.monotonic()
    async with asyncio.timeout(left_s):
        return await work


def _card(service: Service, model: str | None) -> ModelCard:
    cards = service.models()
    for card in cards:
        if model in (None, card.id):
            return card
    names = ", ".join(card.id for card in cards)
    raise ModelNotFound(f"there is no model {str(model)[:200]!r}; there are {names}")


def _model(card: ModelCard) -> Model:
    size = card.default_size
    return Model(
        id=card.id,
        created=card.created,
        owned_by=card.owned_by,
        default_size=size and f"{size[1]}x{size[0]}",
        size_unit=card.size_unit,
        limits=card.limits,
        gang_sizes=card.gang_sizes,
        lacks=card.lacks,
        defaults=card.defaults,
        loras=card.loras,
        controls=card.controls,
        ip_adapters=card.ip_adapters,
        alias_of=card.alias_of,
    )


def _note(request: Request, asked: ImageRequest, config: HttpConfig) -> None:
    noted = request.state.noted
    if asked.user is not None:
        noted["user"] = ascii(asked.user)
    if config.log_prompts:
        noted["prompt"] = ascii(asked.prompt)
