"""Chromium, and pages that must neither complain nor ask anybody but their service."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from deployments.http import HttpConfig
from tests.unit.conftest import serving
from tests.unit.http.fake import FakeService

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Request

FLAGS = [
    "--no-sandbox",  # containers run it as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDE = {"width": 1280, "height": 860}

Open = Callable[..., "Page"]
Serve = Callable[..., str]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    path = os.environ.get("CHROMIUM") or next(filter(None, found), None)
    assert path, "there is no Chromium: apt-get install chromium, or set CHROMIUM to its path"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serves a fake service until the pages are closed; the page's address."""
    with ExitStack() as services:

        def serve_it(service: FakeService, config: HttpConfig | None = None) -> str:
            return f"{services.enter_context(serving(service, config))}/"

        yield serve_it


@pytest.fixture
def open_page(browser: Browser, serve: object) -> Iterator[Open]:
    """Opens the page of a service in a new window, which is closed, and judged, at the end of the test.

    `allowed` are parts of messages that its console may show, such as of answers that are no success.
    """
    opened: list[tuple[Page, list[str], list[str], tuple[str, ...]]] = []

    def open_it(url: str, allowed: tuple[str, ...] = (), **options: Any) -> Page:
        page = browser.new_page(**{"viewport": WIDE, **options})
        page.set_default_timeout(20_000)
        said: list[str] = []
        asked: list[str] = []

        def hear(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning"):
                said.append(message.text)

        def see(request: Request) -> None:
            if request.url.split(":")[0] not in ("blob", "data"):
                asked.append(urlsplit(request.url).netloc)

        page.on("console", hear)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", see)
        opened.append((page, said, asked, allowed))
        page.goto(url)
        return page

    yield open_it
    for page, said, asked, allowed in opened:
        here = urlsplit(page.url).netloc
        page.close()
        assert set(asked) == {here}
        complaints = [text for text in said if not any(part in text for part in allowed)]
        assert not complaints


@pytest.fixture
def service() -> FakeService:
    return FakeService(pace_s=0.03)


@pytest.fixture
def url(service: FakeService, serve: Serve) -> str:
    return serve(service)


@pytest.fixture(scope="session")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures of the page go: the folder that SCREENSHOTS names."""
    folder = os.environ.get("SCREENSHOTS")
    return Path(folder) if folder else tmp_path_factory.mktemp("screenshots")
