"""One slash at the end of a path means nothing."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send


class TrailingSlash:
    """ASGI middleware that answers `/v1/models/` as `/v1/models`: a redirect would cost a form its body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, root = scope.get("path", ""), scope.get("root_path", "")  # which stands before the path
        if scope["type"] == "http" and path != f"{root}/" and path.endswith("/") and not path.endswith("//"):
            scope = {**scope, "path": path[:-1], "raw_path": scope.get("raw_path", b"").removesuffix(b"/")}
        await self._app(scope, receive, send)
