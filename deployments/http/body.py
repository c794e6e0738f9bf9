"""Reading a body, no further than allowed."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from email.message import Message

from fastapi import Request
from starlette.requests import ClientDisconnect

from deployments.http.errors import Refusal
from distriray.wire import Code


async def chunks(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body of a request as it comes, declared in length or in chunks.

    Raises:
        Refusal: 413 beyond `limit` bytes.
        ClientDisconnect: the client left.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise too_large(limit)
    length = 0
    try:
        async for chunk in request.stream():
            length += len(chunk)
            if length > limit:
                raise too_large(limit)
            yield chunk
    except (Refusal, ClientDisconnect):
        raise
    except Exception as error:  # of the server before us, which has lost the client
        raise ClientDisconnect() from error


async def read_body(request: Request, limit: int) -> bytes:
    """The JSON text that a client sends.

    Raises:
        Refusal: 413 beyond `limit` bytes, 400 if it is not said to be JSON.
        ClientDisconnect: the client left.
    """
    body = chunks(request, limit)
    check_content_type(request, "application/json", "JSON")
    return b"".join([chunk async for chunk in body])


def content_type(request: Request) -> str:
    """The declared type of the body, without parameters such as its character set."""
    said = Message()
    said["content-type"] = request.headers.get("content-type", "")
    return said.get_content_type()


def check_content_type(request: Request, wanted: str, what: str) -> None:
    """Raise Refusal (400) unless the body is said to be of the type `wanted`, which is `what` in words."""
    if content_type(request) != wanted:
        given = request.headers.get("content-type", "none")[:100]
        message = f"the content type is {given}; send {what}, with Content-Type: {wanted}"
        raise Refusal(400, Code.UNSUPPORTED_CONTENT_TYPE, message)


def too_large(limit: int, what: str = "the body") -> Refusal:
    """The answer to whoever sends more than is read."""
    return Refusal(413, Code.BODY_TOO_LARGE, f"{what} is longer than {limit} bytes")
