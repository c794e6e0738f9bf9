"""Every error as OpenAI's error object."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, SerializerFunctionWrapHandler, ValidationError, model_serializer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from distriray import errors
from distriray.errors import DeadlineUnmet, DistrirayError, InvalidRequest, QueueFull
from distriray.validation import invalid_request
from distriray.wire import EDITS, OF_PICTURES, PARAMS, Code

CLIENT_LEFT = 499
"""The status of a request whose client did not wait; nobody receives it, logs show it."""

# Serve writes what is said under `ray.serve` to its replicas' logs; elsewhere this is a name like any other.
log = logging.getLogger("ray.serve.distriray.http")

_CODES = {"missing": Code.MISSING_PARAMETER, "extra_forbidden": Code.UNKNOWN_PARAMETER}
# Clients that repeat a 429 or a 5xx by themselves are told not to: it was meant, would fail again, or
# broke as much as it may.
_NO_RETRY = {"X-Should-Retry": "false"}
_LONGEST_PARAM, _LONGEST_MESSAGE = 100, 500


@dataclass(frozen=True, slots=True)
class Answer:
    """What HTTP adds to an error: its status, the field that is always at fault, and whether clients that
    repeat what failed by themselves may do so with this."""

    status: int
    param: str | None = None
    retry: bool = True


ANSWERS: dict[type, Answer] = {
    DistrirayError: Answer(500),
    InvalidRequest: Answer(400),
    errors.ModelNotFound: Answer(404, "model"),
    errors.AdapterNotFound: Answer(404, "loras"),
    errors.UnusableAdapter: Answer(500, "loras", retry=False),
    errors.ControlNetNotFound: Answer(404, "control"),
    errors.UnusableControlNet: Answer(500, "control", retry=False),
    errors.IPAdapterNotFound: Answer(404, "ip_adapters"),
    errors.UnusableIPAdapter: Answer(500, "ip_adapters", retry=False),
    QueueFull: Answer(429),
    DeadlineUnmet: Answer(429, "deadline_s", retry=False),
    errors.TooLong: Answer(429, retry=False),
    errors.GenerationCancelled: Answer(503, retry=False),
    errors.NotEnoughDevices: Answer(503),
    errors.GangBroken: Answer(500, retry=False),
    errors.OutOfMemory: Answer(500, retry=False),
    errors.NotFinite: Answer(500, retry=False),
}
"""Of every kind of error; one that is not here is answered as its base is."""


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
    if isinstance(error, DistrirayError):
        return _refusal_of_own(error)
    if isinstance(error, TimeoutError):
        message = "the image was not finished in the time that a request may take"
        return Refusal(503, Code.TIMEOUT, message, headers=dict(_NO_RETRY))
    message = f"the service failed with a {type(error).__name__}; its log says more"
    return Refusal(500, DistrirayError.code, message)


def _refusal_of_own(error: DistrirayError) -> Refusal:
    answer = next(ANSWERS[kind] for kind in type(error).__mro__ if kind in ANSWERS)
    message, param, possible_s = str(error), answer.param, None
    headers = None if answer.retry else dict(_NO_RETRY)
    match error:
        case InvalidRequest():
            message = re.sub(r"\b(num_images|previews)\b", lambda name: PARAMS[name[0]], message)
            param = PARAMS.get(error.param or "", error.param)
        case QueueFull():
            seconds = min(max(error.retry_after_s, 0.0), 3600.0)
            headers = {"Retry-After": str(max(1, math.ceil(seconds)))}
        case DeadlineUnmet() if error.possible_s is not None and math.isfinite(error.possible_s):
            possible_s = error.possible_s
    return Refusal(answer.status, error.code, message, param, headers, possible_s)


def refusal_of_fields(error: ValidationError) -> Refusal:
    """The first thing that is wrong with a body."""
    found = error.errors(include_url=False, include_input=False)[0]
    if found["type"] == "json_invalid":
        return Refusal(400, Code.INVALID_JSON, f"the body cannot be read: {found['msg']}")
    first = invalid_request(error)
    if found["type"] == "string_pattern_mismatch" and first.param == "size":  # words for the expression
        given = str(error.errors(include_url=False)[0]["input"])[:60]
        message = f"size {given!r} is no size; write WIDTHxHEIGHT in pixels, such as 512x768, or auto"
        return Refusal(400, InvalidRequest.code, message, "size")
    message = str(first)
    if found["type"] == "extra_forbidden" and first.param in OF_PICTURES:
        message += f" in this body; send a form with pictures to {EDITS}"
    return Refusal(400, _CODES.get(found["type"], InvalidRequest.code), message, first.param)


def answer_errors(app: FastAPI) -> None:
    """Let `app` answer every error that a handler or the router raises, and its log line name the code."""

    async def refused(request: Request, error: Exception) -> Response:
        refusal = refusal_of(error)
        request.state.noted["code"] = refusal.code
        if refusal.code == DistrirayError.code:
            log.error("request %s failed", request.state.request_id, exc_info=error)
        return refusal.response()

    async def by_router(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        where, headers = f"{request.method} {request.url.path}", dict(error.headers or {})
        if error.status_code == 404:
            refusal = Refusal(404, Code.UNKNOWN_URL, f"there is no {where}; /docs lists what there is")
        elif error.status_code == 405:
            allowed = headers.get("Allow", "")
            headers["Allow"] = allowed = "GET, HEAD" if allowed == "GET" else allowed
            if request.method == "OPTIONS":
                return Response(status_code=204, headers={"Allow": f"{allowed}, OPTIONS"})
            refusal = Refusal(405, Code.METHOD_NOT_ALLOWED, f"there is no {where}; use {allowed}")
        else:
            refusal = Refusal(error.status_code, InvalidRequest.code, str(error.detail))
        refusal.headers = headers
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
