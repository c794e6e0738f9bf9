"""What pydantic finds wrong in a request, as one sentence."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from distriray.errors import InvalidRequest


def invalid_request(error: ValidationError) -> InvalidRequest:
    """The first error that pydantic found, as one sentence with the field and the value."""
    first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"] if isinstance(part, int | str)]
    param, whole = place[0] if place else None, ".".join(place)
    if first["type"] == "value_error":
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, InvalidRequest):
            return _of_entry(cause, whole) if place[1:] and cause.param == place[-1] else cause
        return InvalidRequest(str(cause), param)
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"there is no field {whole!r}", param, "there is no such field")
    if first["type"] == "missing":
        return InvalidRequest(f"{whole} is missing", param)
    message = first["msg"][0].lower() + first["msg"][1:].replace("valid tuple", "valid list")  # JSON's word
    what = param or "request"
    return InvalidRequest(f"{what} {_shortened(first['input'])}: {message}", param, f"{what}: {message}")


def _of_entry(error: InvalidRequest, whole: str) -> InvalidRequest:
    """The error of a picture, which knows itself as `image`, by the name that it has in a request's list."""
    message, unquoted = (
        f"{whole}{text.removeprefix(error.param or '')}" for text in (str(error), error.unquoted)
    )
    return InvalidRequest(message, whole, unquoted)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
