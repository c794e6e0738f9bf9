"""The OpenAPI document, with the limits of the models that are served."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, get_args

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from deployments.http.errors import ErrorResponse
from deployments.http.form import MANY
from deployments.http.images import EditRequest, ImageRequest, VariationRequest
from deployments.http.responses import (
    CompletedEvent,
    ErrorEvent,
    ImagesResponse,
    PartialImageEvent,
    ProgressEvent,
)
from distriray.limits import Limits
from distriray.service import FleetNews, ModelCard, Service
from distriray.version import __version__
from distriray.wire import PARAMS

_EVENTS: tuple[type[BaseModel], ...] = (PartialImageEvent, ProgressEvent, CompletedEvent, ErrorEvent)
_REQUESTS: tuple[type[ImageRequest], ...] = (ImageRequest, EditRequest, VariationRequest)
_BODIES: tuple[type[BaseModel], ...] = (*_REQUESTS, ImagesResponse, ErrorResponse, FleetNews, *_EVENTS)
_REASONS = {
    400: "A field, or the body, cannot be served as it is",
    401: "No key, a wrong key, or no keys configured and the client is on another machine",
    404: "No such model, adapter, ControlNet or IP-Adapter, or no such request",
    413: "The body is too long",
    429: "The queue is full, the deadline cannot be met, or enough watch already",
    500: "The service failed",
    503: "No host can serve now",
}
_REF = "#/components/schemas/"
_FILE = {"type": "string", "format": "binary"}
_PICTURES = {"contentType": "image/png, image/jpeg, image/webp"}
_SEVERAL = f"{MANY}[]"


def _names_of_events() -> list[str]:
    kinds: list[Any] = [event.model_fields["type"].annotation for event in _EVENTS]
    return [name for kind in kinds for name in get_args(kind)]


_EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": _names_of_events()},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"oneOf": [{"$ref": f"{_REF}{event.__name__}"} for event in _EVENTS]},
        },
    },
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """A route's error responses."""
    return {status: {"model": ErrorResponse, "description": _REASONS[status]} for status in statuses}


def describe_images(asked: type[ImageRequest]) -> dict[str, Any]:
    """The body and the two kinds of success of a request for images, whose body is read by hand: the
    framework's parser accepts NaN and coerces."""
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": f"{_REF}{asked.__name__}"}}}
    if asked.FILES:
        form = {"$ref": f"{_REF}{_form_of(asked)}"}
        files = dict.fromkeys((*asked.FILES, _SEVERAL), _PICTURES)
        content["multipart/form-data"] = {"schema": form, "encoding": files}
    return {
        "requestBody": {"required": True, "content": content},
        "responses": {
            "200": {
                "description": "The images; with `stream: true` server-sent events",
                "headers": {"X-Request-ID": {"schema": {"type": "string"}}},
                "content": {
                    "application/json": {"schema": {"$ref": f"{_REF}ImagesResponse"}},
                    "text/event-stream": {"itemSchema": _EVENT},
                },
            },
            "429": {
                "headers": {
                    "Retry-After": {
                        "description": "Seconds until the queue has room; not with `deadline_unmet`",
                        "schema": {"type": "integer"},
                    }
                }
            },
        },
    }


def describe_watch() -> dict[str, Any]:
    """The success of GET /v1/fleet/events."""
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"$ref": f"{_REF}FleetNews"},
    }
    event = {
        "type": "object",
        "required": ["event", "data"],
        "properties": {"event": {"const": "fleet.news"}, "data": data},
    }
    return {
        "responses": {
            "200": {
                "description": "Server-sent events, for a minute at most; then ask again",
                "content": {"text/event-stream": {"itemSchema": event}},
            },
            "429": {"headers": {"Retry-After": {"schema": {"type": "integer"}}}},
        }
    }


def document(app: FastAPI, service: Service) -> Callable[[], dict[str, Any]]:
    """The function `app.openapi`, whose document always describes the models that are served now.

    It is made anew only when these have changed: it takes a while, for which others wait, and needs no key.
    """
    known: tuple[list[ModelCard], dict[str, Any]] | None = None

    def openapi() -> dict[str, Any]:
        nonlocal known
        cards = service.models()
        if known is None or known[0] != cards:
            known = list(cards), describe(cards)
        return known[1]

    def describe(cards: list[ModelCard]) -> dict[str, Any]:
        document = get_openapi(
            title="distriray",
            version=__version__,
            summary="Images by gangs of workers, with OpenAI's Images API",
            routes=app.routes,
        )
        schemas = document["components"]["schemas"]
        for body in _BODIES:
            own = body.model_json_schema(ref_template=f"{_REF}{{model}}")
            schemas.update(own.pop("$defs", {}))
            schemas[body.__name__] = own
        for asked in _REQUESTS:
            fields = schemas[asked.__name__]["properties"]
            _limit(fields, cards)
            if asked.FILES:
                schemas[_form_of(asked)] = _form(schemas[asked.__name__], asked.FILES)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        return document

    return openapi


def _form_of(asked: type[ImageRequest]) -> str:
    """The name of the schema of a request as a form."""
    return f"{asked.__name__}Form"


def _form(body: dict[str, Any], files: Collection[str]) -> dict[str, Any]:
    """The schema of a request as a form, whose image may be one of several."""
    fields = body["properties"]
    parts = {name: _part(name in files, field) for name, field in fields.items()}
    said = "Several pictures, or one, in place of `image`: those after the first are `references`."
    parts[_SEVERAL] = {"type": "array", "items": _FILE, "minItems": 1, "description": said}
    others = fields["references"]["anyOf"][0]
    if others["type"] == "null" or "maxItems" in others:
        parts[_SEVERAL]["maxItems"] = 1 + others.get("maxItems", 0)
    required = [name for name in body["required"] if name != MANY]
    either = [{"required": [MANY]}, {"required": [_SEVERAL]}]
    return {**body, "properties": parts, "required": required, "oneOf": either}


def _part(is_file: bool, field: dict[str, Any]) -> dict[str, Any]:
    """A field of a form: files are as they are, and lists JSON in one part."""
    if is_file:
        return {**_FILE, "description": field["description"]}
    if any(kind.get("type") == "array" for kind in field.get("anyOf", [field])):
        said = {"type": "string", "contentMediaType": "application/json", "contentSchema": field}
        return {**said, "description": field["description"]}
    return field


def _limit(fields: dict[str, Any], cards: list[ModelCard]) -> None:
    """Bound the fields by what at least one model accepts."""
    if not cards:
        return
    limits = Limits.widest(card.limits for card in cards)
    side = sides_pattern(limits.min_side, limits.max_side, min(card.size_unit for card in cards))
    bounds: dict[str, dict[str, Any]] = {
        "model": {"enum": [card.id for card in cards]},
        "size": {"pattern": f"^(auto|{side}x{side})$"},
        "gang_size": {"enum": sorted({size for card in cards for size in card.gang_sizes})},
    }
    bounds |= {text: {"maxLength": limits.max_prompt_chars} for text in Limits.TEXTS}
    bounds |= {
        PARAMS.get(field, field): {"maximum": getattr(limits, limit)}
        for field, limit in Limits.LARGEST.items()
    }
    bounds |= {field: {"maxItems": getattr(limits, limit)} for field, limit in Limits.LONGEST.items()}
    for name, bound in bounds.items():
        field = fields[name]
        (field["anyOf"][0] if "anyOf" in field else field).update(bound)
    for lacked in set.intersection(*(set(card.lacks) for card in cards)):
        field = fields.get(PARAMS.get(lacked, lacked), {})
        if {"type": "null"} in field.get("anyOf", ()):
            field["anyOf"] = [{"type": "null"}]


def sides_pattern(smallest: int, largest: int, unit: int) -> str:
    """A regular expression of the multiples of `unit` from `smallest` to `largest`, in decimals.

    Numbers that end in the same two digits share what comes before them.
    """
    first = -(-smallest // unit) * unit
    endings: dict[int, list[str]] = {}
    for side in range(first, largest + 1, unit):
        endings.setdefault(side // 100, []).append(f"{side % 100:02}" if side >= 100 else str(side))
    heads: dict[str, list[str]] = {}
    for head, ends in endings.items():
        heads.setdefault("|".join(ends), []).append(str(head) if head else "")
    alternatives = [f"({'|'.join(before)})({after})" for after, before in heads.items()]
    return f"({'|'.join(alternatives)})"
