"""Prompts from a file: JSON lines of the fields of `GenerationRequest`."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from ..errors import InvalidRequest
from ..requests import GenerationRequest, Limits

FIELD = re.compile(r"[a-z][a-z0-9_]{0,30}")
"""What the name of a field may be; any other key of a line may be text that somebody meant to draw."""


@dataclass(frozen=True)
class Prompt:
    """One good line, counted from 1. `id` is its content's digest, so it stays when lines move."""

    id: str
    line: int
    request: GenerationRequest


@dataclass(frozen=True)
class BadLine:
    """One line that cannot be made, and why; `param` is the field at fault.

    Neither holds text of the line, which may be a prompt.
    """

    line: int
    message: str
    param: str | None


def read_prompts(
    path: Path, *, model: str | None = None, limits: Limits | None = None
) -> tuple[list[Prompt], list[BadLine]]:
    """The good and the bad lines of a file, in order. Empty lines are neither.

    Equal lines are requests of their own: the second has `-2` behind its id. A line without a seed gets one
    from its id, so that making it again makes the same pictures.

    Args:
        model: the model of lines that name none.
        limits: lines beyond them are bad ones, too.

    Raises:
        OSError: the file cannot be read.
    """
    good: list[Prompt] = []
    bad: list[BadLine] = []
    seen: Counter[str] = Counter()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                request = GenerationRequest.parse(line.removeprefix(b"\xef\xbb\xbf"))
                if limits is not None:
                    limits.check(request)
            except InvalidRequest as error:
                param = error.param if FIELD.fullmatch(error.param or "") else None
                bad.append(BadLine(number, plain(error), param))
                continue
            request = request.model_copy(update={"model": request.model or model})
            digest = _digest(request)
            seen[digest] += 1
            name = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
            good.append(Prompt(name, number, _named(request, name)))
    return good, bad


def plain(error: Exception) -> str:
    """What `error` says, without text of the request."""
    return error.unquoted if isinstance(error, InvalidRequest) else str(error)


def _digest(request: GenerationRequest) -> str:
    fields = request.model_dump(mode="json", exclude_unset=True)
    fields["model"] = request.model
    return sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _named(request: GenerationRequest, name: str) -> GenerationRequest:
    seeded = request.seeded(int.from_bytes(sha256(name.encode()).digest()[:4]))
    return seeded.model_copy(update={"id": name, "previews": 0})
