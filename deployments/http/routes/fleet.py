"""The fleet: how it stands, what happens in it, and whether a request could be served."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from deployments.http.disconnect import EventStream
from deployments.http.health import Health
from deployments.http.openapi import describe_watch, errors
from deployments.http.watch import Watch
from distriray.errors import DistrirayError, NotEnoughDevices
from distriray.service import Fleet, Service


class Healthy(BaseModel):
    """A request that came now could be served."""

    status: Literal["ok"] = "ok"


def fleet_routes(service: Service) -> APIRouter:
    """The fleet of `service`, for those who may ask."""
    router, watch = APIRouter(tags=["fleet"]), Watch(service)

    @router.get(
        "/v1/fleet", responses=errors(401, 500, 503), summary="Hosts, gangs, queues and predicted waits"
    )
    async def get_fleet() -> Fleet:
        return await service.fleet()

    @router.get(
        "/v1/fleet/events",
        response_class=Response,
        responses=errors(401, 429, 500),
        openapi_extra=describe_watch(),
        summary="What happens in the fleet, as it happens",
    )
    async def watch_fleet(request: Request) -> Response:
        if request.state.head:
            return Response(media_type="text/event-stream")
        watcher = watch.join()
        return EventStream(watcher.frames(request), watcher)

    return router


def health_routes(service: Service) -> APIRouter:
    """The health of `service`, for everybody: whoever looks after machines has no key."""
    router, health = APIRouter(tags=["fleet"]), Health(service)

    @router.get("/healthz", responses=errors(503), summary="Whether a request could be served")
    async def get_health() -> Healthy:
        try:
            await health.check()
        except DistrirayError as error:
            raise NotEnoughDevices(str(error)) from error
        return Healthy()

    return router
