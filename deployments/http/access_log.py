"""Around every request: its id, one line in the log, and an answer even when the application fails."""

from __future__ import annotations

import time
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.http.errors import log, refusal_of
from distriray.wire import REQUEST_ID


class RequestIdAndLog:
    """ASGI middleware. `request.state.request_id` is the X-Request-ID that the client or a proxy gave, or a
    new one; `request.state.noted` collects what the log line shall say besides."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid4().hex
        noted: dict[str, object] = {}
        scope["state"] = {**scope.get("state", {}), "request_id": request_id, "noted": noted, "head": False}
        began, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not given:  # whoever gave one, such as Serve's proxy, also returns it
                    MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            log.exception("request %s failed", request_id)
            refusal = refusal_of(error)
            noted["code"] = refusal.code
            if status:
                raise
            await refusal.response()(scope, receive, send_with_id)
        finally:
            fields = {
                "request_id": request_id,
                "method": scope["method"],
                "path": ascii(scope["path"]),
                "status": status,
                "seconds": round(time.monotonic() - began, 3),
                **noted,
            }
            log.info(" ".join(f"{name}=%s" for name in fields), *fields.values(), extra={"http": fields})
