"""The page at `/`: its files, read once, and the headers that keep it to this service."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request, Response

from deployments.http.errors import Refusal
from distriray.wire import Code

FOLDER = Path(__file__).parent / "page"
INDEX = "index.html"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""Media types of what a page may consist of; other files are not sent."""

HEADERS = {
    # The page runs its own files, asks its own service, and shows pictures that it was sent or given.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again each time, and answered with 304 while it is the same
}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    headers: dict[str, str]


def add_page(app: FastAPI) -> None:
    """Let `app` answer `/` and the files of the page. They hold nothing that needs a key."""
    files = {path.name: _read(path) for path in FOLDER.iterdir() if path.suffix in TYPES}

    @app.get("/", include_in_schema=False)
    async def get_page(request: Request) -> Response:
        return _answer(request, files[INDEX])

    @app.get("/page/{name}", include_in_schema=False)
    async def get_file(request: Request, name: str) -> Response:
        if name not in files:
            raise Refusal(404, Code.UNKNOWN_URL, f"the page has no file {name[:100]!r}")
        return _answer(request, files[name])


def _read(path: Path) -> _File:
    content = path.read_bytes()
    tag = hashlib.sha256(content).hexdigest()[:32]
    return _File(content, {**HEADERS, "Content-Type": TYPES[path.suffix], "ETag": f'"{tag}"'})


def _answer(request: Request, file: _File) -> Response:
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if file.headers["ETag"] in known:
        return Response(status_code=304, headers=file.headers)
    return Response(file.content, headers=file.headers)
