"""What pydantic finds wrong in a request, as one sentence."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from distriray.errors import InvalidRequest

_BRANCH = re.compile(r"int|float|str|bool|.*[^a-z0-9_].*")
"""What pydantic puts among the names of fields where a value may be of several types: the type it tried."""


def invalid_request(error: ValidationError) -> InvalidRequest:
    """The first error that pydantic found, as one sentence with the field and the value.

    Of a value that may be of several types, and is none, that is the deepest, or what each of them asks for.
    """
    errors = [(_place(each), each) for each in error.errors(include_url=False)]
    outer, _ = errors[0]
    place, first = max(
        (each for each in errors if each[0][: len(outer)] == outer), key=lambda each: len(each[0])
    )
    param = ".".join(place) or None
    if first["type"] == "value_error":
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, InvalidRequest):
            return _of_entry(cause, place) if place[1:] and cause.param == place[-1] else cause
        return InvalidRequest(str(cause), param)
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"there is no field {param!r}", param, "there is no such field")
    if first["type"] == "missing":
        return InvalidRequest(f"{param} is missing", param)
    if first["type"] == "too_long":
        lists = f"{param} lists {first['ctx']['actual_length']}; no request may list over"
        return InvalidRequest(f"{lists} {first['ctx']['max_length']}", param)
    asked = [_sentence(each["msg"]) for where, each in errors if where == place]
    message = ", or ".join([asked[0], *(each.removeprefix("input should be ") for each in asked[1:])])
    what = param or "request"
    return InvalidRequest(f"{what} {_shortened(first['input'])}: {message}", param, f"{what}: {message}")


def _place(error: ErrorDetails) -> list[str]:
    """The names of the fields that lead to an error, the outermost first; what is no field has any name."""
    names = [str(part) for part in error["loc"]]
    branches = range(1, len(names) - (error["type"] == "extra_forbidden"))
    return [name for i, name in enumerate(names) if i not in branches or not _BRANCH.fullmatch(name)]


def _sentence(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[0].lower() + message[1:].replace("valid tuple", "valid list")  # JSON's word


def _of_entry(error: InvalidRequest, place: list[str]) -> InvalidRequest:
    """The error of a picture, which knows itself as `image`, by the name that it has in a request's list."""
    whole = ".".join(place)
    message, unquoted = (
        f"{whole}{text.removeprefix(error.param or '')}" for text in (str(error), error.unquoted)
    )
    return InvalidRequest(message, whole, unquoted)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
