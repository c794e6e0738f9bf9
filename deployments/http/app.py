"""The application: OpenAI's Images API over a service."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware

from deployments.http.access_log import RequestIdAndLog
from deployments.http.auth import require_key
from deployments.http.config import HttpConfig
from deployments.http.errors import answer_errors
from deployments.http.head import HeadAsGet
from deployments.http.openapi import document
from deployments.http.paths import TrailingSlash
from deployments.http.routes.fleet import fleet_routes, health_routes
from deployments.http.routes.images import image_routes
from deployments.http.routes.models import model_routes
from deployments.http.site import add_page
from deployments.http.viewer import add_viewer
from distriray.service import Service


def build_http(
    service: Service, config: HttpConfig, cancel: Callable[[str], Awaitable[bool]] | None = None
) -> FastAPI:
    """OpenAI's Images API over `service`.

    Args:
        cancel: stops a request of any router's, where `service.cancel` is one router's.

    Raises:
        ValueError, OSError: the keys cannot be had; see `HttpConfig.keys`.
    """
    app = FastAPI(redirect_slashes=False, docs_url=None, redoc_url=None)
    app.openapi = document(app, service)  # type: ignore[method-assign]
    app.add_middleware(HeadAsGet)
    app.add_middleware(TrailingSlash)
    app.add_middleware(RequestIdAndLog)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            # Browsers name those of the client's own, and no cookie opens anything here.
            allow_headers=("*",),
            expose_headers=("X-Request-ID", "Retry-After", "X-Should-Retry"),
        )
    answer_errors(app)
    allowed = [Depends(require_key(config))]
    app.include_router(image_routes(service, config, cancel or service.cancel), dependencies=allowed)
    app.include_router(model_routes(service), dependencies=allowed)
    app.include_router(fleet_routes(service), dependencies=allowed)
    app.include_router(health_routes(service))
    add_viewer(app)
    if config.page:
        add_page(app)
    return app
