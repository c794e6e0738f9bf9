"""A fake service behind a real server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import uvicorn

from deployments.http import HttpConfig, build_http
from tests.unit.http.fake import FakeService

LOG = "ray.serve.distriray.http"


@contextmanager
def serving(service: FakeService, config: HttpConfig | None = None) -> Iterator[str]:
    """Serve on a free port of this machine; the address. Whoever is still being answered is cut off."""
    app = build_http(service, config or HttpConfig(keys_env="NO_SUCH_VARIABLE"))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://localhost:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def service() -> FakeService:
    """Shared by a module; every request ends in it at once."""
    return FakeService()


@pytest.fixture(scope="module")
def url(service: FakeService) -> Iterator[str]:
    with serving(service) as address:
        yield address


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url) as client:
        yield client
