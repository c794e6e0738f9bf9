"""Prompts from a file: JSON lines of the fields of `GenerationRequest`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from distriray.errors import InvalidRequest
from distriray.limits import Limits
from distriray.picture import Picture
from distriray.requests import GenerationRequest, image_of

_NAME = r"[a-z][a-z0-9_]{0,30}"
FIELD = re.compile(rf"{_NAME}(\.({_NAME}|[0-9]{{1,9}})){{0,4}}")
"""What the name of a field may be, or the whole way to it; any other key of a line may be text that somebody
meant to draw."""


@dataclass(frozen=True)
class Prompt:
    """One good line, counted from 1. `id` is the digest of what it draws, so it stays when lines move.

    `request` is without the pictures that lie in files, since of many lines they would fill the memory;
    `files` are these, with the digests of what was in them, and `whole` reads them again.
    """

    id: str
    line: int
    request: GenerationRequest
    files: Mapping[str, tuple[Path, bytes]] = field(default_factory=dict)

    def whole(self) -> GenerationRequest:
        """The request with its pictures; raises InvalidRequest where a file is not what it was any more."""
        pictures = {name: _as_it_was(name, *file) for name, file in self.files.items()}
        return self.request.with_pictures(pictures)


@dataclass(frozen=True)
class BadLine:
    """One line that cannot be made, and why; `param` is the field at fault.

    Neither holds text of the line, which may be a prompt.
    """

    line: int
    message: str
    param: str | None


def read_prompts(
    path: Path,
    *,
    model: str | None = None,
    limits: Limits | None = None,
    settings: Callable[[GenerationRequest], Mapping[str, Any]] = lambda _: {},
) -> tuple[list[Prompt], list[BadLine]]:
    """The good and the bad lines of a file, in order. Empty lines are neither.

    Pictures are files beside it, or `data:` URLs.

    Equal lines are requests of their own: the second has `-2` behind its id. A line without a seed gets one
    from its id, so that making it again makes the same pictures.

    Args:
        model: the model of lines that name none.
        limits: lines beyond them are bad ones, too.
        settings: what decides the picture of a line besides itself; with others it is another prompt.

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
                request = GenerationRequest.parse(
                    _with_paths(line.removeprefix(b"\xef\xbb\xbf"), path.parent)
                )
                if limits is not None:
                    limits.check(request)
                for field_name, picture in request.pictures.items():
                    picture.load(field_name)
            except InvalidRequest as error:
                param = error.param if FIELD.fullmatch(error.param or "") else None
                bad.append(BadLine(number, plain(error), param))
                continue
            request = request.model_copy(update={"model": request.model or model})
            digest = _digest(request, settings(request))
            seen[digest] += 1
            name = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
            files = {
                of: (picture.path, sha256(picture.data).digest())
                for of, picture in request.pictures.items()
                if picture.path
            }
            named = _named(request, name).with_pictures(dict.fromkeys(files))
            good.append(Prompt(name, number, named, files))
    return good, bad


def _as_it_was(name: str, path: Path, digest: bytes) -> Picture:
    """The picture in a file; raises InvalidRequest unless its content has that digest."""
    picture = Picture.of(path, name)
    if sha256(picture.data).digest() != digest:
        why = "has changed since the job began; run the same command again for it"
        raise InvalidRequest(f"{name} {str(path)!r} {why}", name, f"{name} {why}")
    return picture


def _with_paths(line: bytes, folder: Path) -> dict[str, Any] | bytes:
    """The fields of a line, with the paths of its pictures in `folder`; the line as it is if it has none.

    Raises:
        InvalidRequest: a path leads out of the folder.
    """
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):  # which GenerationRequest says in its own words
        return line
    if not isinstance(fields, dict):
        return line
    own = _paths(fields, {name: name for name in GenerationRequest.FILES}, folder)
    listed = {
        name: tuple(
            {**each, **_paths(each, {"image": image_of(name, index)}, folder)}
            if isinstance(each, dict)
            else each
            for index, each in enumerate(fields[name])
        )
        for name in GenerationRequest.WITH_IMAGES
        if isinstance(fields.get(name), list)
    }
    return {**fields, **own, **listed} if own or listed else line


def _paths(fields: Mapping[str, Any], pictures: Mapping[str, str], folder: Path) -> dict[str, Path]:
    """Fields that are paths of pictures in `folder`; raises InvalidRequest.

    `pictures` has what a line calls the picture of each field.
    """
    given = {own: fields[own] for own in pictures if fields.get(own) is not None}
    for own, value in given.items():
        if not isinstance(value, str):
            name = pictures[own]
            raise InvalidRequest(f"{name} is no text; write the path of a picture, or a data: URL", name)
    return {
        own: _inside(folder, text, pictures[own])
        for own, text in given.items()
        if not text.startswith("data:")
    }


def _inside(folder: Path, text: str, name: str) -> Path:
    """The file of that path in `folder`; links that lead out of it lead nowhere."""
    home = folder.resolve()
    try:
        path = (home / text).resolve()
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{name} {text[:100]!r} is no path", name, f"{name} is no path") from error
    if not path.is_relative_to(home):
        where = f"lies outside of {home}; put it beside the prompts"
        raise InvalidRequest(f"{name} {text!r} {where}", name, f"{name} {where}")
    return path


def plain(error: Exception) -> str:
    """The message of `error`, without text of the request."""
    return error.unquoted if isinstance(error, InvalidRequest) else str(error)


def _digest(request: GenerationRequest, settings: Mapping[str, Any]) -> str:
    fields = request.model_dump(mode="json", exclude_unset=True)
    fields["model"] = request.model
    if settings:
        fields["settings"] = settings
    return sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _named(request: GenerationRequest, name: str) -> GenerationRequest:
    seeded = request.seeded(int.from_bytes(sha256(name.encode()).digest()[:4]))
    return seeded.model_copy(update={"id": name, "previews": 0})
