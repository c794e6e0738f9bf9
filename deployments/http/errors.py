"""Every error as OpenAI's error object."""

from __future__ import annotations

import logging
import math
import re
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, SerializerFunctionWrapHandler, ValidationError, model_serializer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from distriray.errors import (
    AdapterNotFound,
    ControlNetNotFound,
    DeadlineUnmet,
    DistrirayError,
    GangBroken,
    GenerationCancelled,
    InvalidRequest,
    IPAdapterNotFound,
    ModelNotFound,
    NotEnoughDevices,
    NotFinite,
    OutOfMemory,
    QueueFull,
    TooLong,
    UnusableAdapter,
    UnusableControlNet,
    UnusableIPAdapter,
)
from distriray.validation import invalid_request
from distriray.wire import EDITS, OF_PICTURES, PARAMS

CLIENT_LEFT = 499
"""The status of a request whose client did not wait; nobody receives it, logs show it."""

# Serve writes what is said under `ray.serve` to its replicas' logs; elsewhere this is a name like any other.
log = logging.getLogger("ray.serve.distriray.http")

_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
# Clients that repeat a 429 or 503 by themselves are told not to: it was meant, or would fail again.
_NO_RETRY = {"X-Should-Retry": "false"}
_LONGEST_PARAM, _LONGEST_MESSAGE = 100, 500


class ErrorObject(BaseModel):
    """An error; `code` is stable, `param` is the field at fault, `possible_s` comes with
    `deadline_unmet` only: the seconds in which it could be done."""

    message: str
    type: str
    param: str | None
    code: str
    possible_s: float | None = None

    @model_serializer(mode="wrap")
    def _without_unset(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        if self.possible_s is None:
            del fields["possible_s"]
        return fields


class ErrorResponse(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorObject


class Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        possible_s: float | None = None,
    ) -> None:
        super().__init__(message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}...")
        self.status, self.code, self.headers = status, code, headers
        self.param = param and param[:_LONGEST_PARAM]
        self.possible_s = possible_s

    @property
    def error(self) -> ErrorObject:
        kind = "invalid_request_error" if self.status < 429 else "rate_limit_error"
        return ErrorObject(
            message=str(self),
            type=kind if self.status < 500 else "server_error",
            param=self.param,
            code=self.code,
            possible_s=self.possible_s,
        )

    def response(self) -> Response:
        return JSONResponse(ErrorResponse(error=self.error).model_dump(), self.status, self.headers)


def refusal_of(error: Exception) -> Refusal:
    """The answer to any `error`. Its message keeps out what is not meant for clients."""
    if isinstance(error, Refusal):
        return error
    cause = getattr(error, "cause", None)  # an error that crossed Ray is a RayTaskError around the original
    if isinstance(cause, Exception) and cause is not error:
        return refusal_of(cause)
    match error:
        case InvalidRequest():
            message = re.sub(r"\b(num_images|previews)\b", lambda name: PARAMS[name[0]], str(error))
            return Refusal(400, "invalid_value", message, PARAMS.get(error.param or "", error.param))
        case ModelNotFound():
            return Refusal(404, "model_not_found", str(error), "model")
        case AdapterNotFound():
            return Refusal(404, "adapter_not_found", str(error), "loras")
        case UnusableAdapter():
            return Refusal(500, "adapter_unusable", str(error), "loras", dict(_NO_RETRY))
        case ControlNetNotFound():
            return Refusal(404, "controlnet_not_found", str(error), "control")
        case UnusableControlNet():
            return Refusal(500, "controlnet_unusable", str(error), "control", dict(_NO_RETRY))
        case IPAdapterNotFound():
            return Refusal(404, "ip_adapter_not_found", str(error), "ip_adapters")
        case UnusableIPAdapter():
            return Refusal(500, "ip_adapter_unusable", str(error), "ip_adapters", dict(_NO_RETRY))
        case QueueFull():
            seconds = min(max(error.retry_after_s, 0.0), 3600.0)
            return Refusal(
                429, "queue_full", str(error), headers={"Retry-After": str(max(1, math.ceil(seconds)))}
            )
        case DeadlineUnmet():
            param = None if isinstance(error, TooLong) else "deadline_s"
            possible = error.possible_s
            if possible is not None and not math.isfinite(possible):
                possible = None
            return Refusal(429, "deadline_unmet", str(error), param, dict(_NO_RETRY), possible)
        case GenerationCancelled():
            return Refusal(503, "cancelled", str(error), headers=dict(_NO_RETRY))
        case NotEnoughDevices():
            return Refusal(503, "unavailable", str(error))
        case GangBroken():
            return Refusal(500, "gang_broken", str(error))
        case OutOfMemory():
            return Refusal(500, "out_of_memory", str(error), headers=dict(_NO_RETRY))
        case NotFinite():
            return Refusal(500, "not_finite", str(error), headers=dict(_NO_RETRY))
        case TimeoutError():
            message = "the image was not finished in the time that a request may take"
            return Refusal(503, "timeout", message, headers=dict(_NO_RETRY))
        case DistrirayError():
            return Refusal(500, "internal_error", str(error))
    return Refusal(
        500, "internal_error", f"the service failed with a {type(error).__name__}; its log says more"
    )


def refusal_of_fields(error: ValidationError) -> Refusal:
    """The first thing that is wrong with a body."""
    found = error.errors(include_url=False, include_input=False)[0]
    if found["type"] == "json_invalid":
        return Refusal(400, "invalid_json", f"the body cannot be read: {found['msg']}")
    first = invalid_request(error)
    if found["type"] == "string_pattern_mismatch" and first.param == "size":  # words for the expression
        given = str(error.errors(include_url=False)[0]["input"])[:60]
        message = f"size {given!r} is no size; write WIDTHxHEIGHT in pixels, such as 512x768, or auto"
        return Refusal(400, "invalid_value", message, "size")
    message = str(first)
    if found["type"] == "extra_forbidden" and first.param in OF_PICTURES:
        message += f" in this body; send a form with pictures to {EDITS}"
    return Refusal(400, _CODES.get(found["type"], "invalid_value"), message, first.param)


def answer_errors(app: FastAPI) -> None:
    """Let `app` answer every error that a handler or the router raises, and its log line name the code."""

    async def refused(request: Request, error: Exception) -> Response:
        refusal = refusal_of(error)
        request.state.noted["code"] = refusal.code
        if refusal.code == "internal_error":
            log.error("request %s failed", request.state.request_id, exc_info=error)
        return refusal.response()

    async def by_router(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        where = f"{request.method} {request.url.path}"
        if error.status_code == 404:
            refusal = Refusal(404, "unknown_url", f"there is no {where}; /docs lists what there is")
        elif error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            allowed = "GET, HEAD" if allowed == "GET" else allowed
            if request.method == "OPTIONS":
                return Response(status_code=204, headers={"Allow": f"{allowed}, OPTIONS"})
            refusal = Refusal(405, "method_not_allowed", f"there is no {where}; use {allowed}")
        else:
            refusal = Refusal(error.status_code, "invalid_value", str(error.detail))
        refusal.headers = dict(error.headers or {})
        if error.status_code == 405:
            refusal.headers = {**refusal.headers, "Allow": allowed}
        request.state.noted["code"] = refusal.code
        return refusal.response()

    async def left(request: Request, error: Exception) -> Response:
        request.state.noted["code"] = "client_left"
        return Response(status_code=CLIENT_LEFT)

    app.add_exception_handler(DistrirayError, refused)
    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(TimeoutError, refused)
    app.add_exception_handler(HTTPException, by_router)
    app.add_exception_handler(ClientDisconnect, left)
