"""Reading a form with pictures, no further than allowed and never onto a disk."""

from __future__ import annotations

import sys
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from deployments.http.body import check_content_type, chunks, too_large
from deployments.http.config import HttpConfig
from deployments.http.errors import Refusal
from distriray.errors import InvalidRequest
from distriray.wire import Code

MAX_FILES, MAX_FIELDS = 16, 64
MANY = "image"
"""The field of which a form may have several files, as `image[]`."""


class _InMemory(MultiPartParser):
    """Files stay in memory, which the bound of the body is for; `complete` is whether it has its end."""

    spool_max_size = sys.maxsize
    complete = False

    @property
    def _charset(self) -> str:
        """UTF-8 whatever the form says (RFC 7578, 5.1.2): some of Python's decoders are slow."""
        return "utf-8"

    @_charset.setter
    def _charset(self, said: str) -> None:
        pass

    def on_end(self) -> None:
        self.complete = True

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        try:
            super().on_part_data(data, start, end)
        except MultiPartException as error:
            raise too_large(self.max_part_size, "a text in the form") from error

    def on_part_end(self) -> None:
        name, text = self._current_part.field_name, self._current_part.data
        try:
            text.decode()
        except UnicodeDecodeError as error:  # which would be read as if it were Latin-1
            raise Refusal(400, InvalidRequest.code, f"{name[:100]} is no UTF-8", name) from error
        super().on_part_end()


async def read_form(request: Request, config: HttpConfig) -> dict[str, str | bytes | list[bytes]]:
    """The fields of a form by name: a text, the content of a file, or that of several.

    `image[]`, by which lists are sent, is `image`, and may be there more than once. A file without name and
    content is none, as browsers send it where nothing was chosen.

    Raises:
        Refusal: 413 beyond the bound, 400 if it is no form, cannot be read, or has a field twice.
        ClientDisconnect: the client left.
    """
    check_content_type(request, "multipart/form-data", "a form")
    body = chunks(request, config.max_upload_bytes)
    limits: dict[str, Any] = {"max_files": MAX_FILES, "max_fields": MAX_FIELDS}
    parser = _InMemory(request.headers, body, max_part_size=config.max_body_bytes, **limits)
    try:
        form = await parser.parse()
    except (Refusal, ClientDisconnect):
        raise
    except MultiPartException as error:
        raise Refusal(400, Code.INVALID_FORM, f"the form cannot be read: {error.message}") from error
    except Exception as error:  # whatever a parser of foreign bytes comes to
        raise Refusal(400, Code.INVALID_FORM, "the form cannot be read") from error
    if not parser.complete:
        raise Refusal(400, Code.INVALID_FORM, "the form is cut short: its last boundary is missing")
    return _fields(form.multi_items())


def _fields(items: list[tuple[str, str | UploadFile]]) -> dict[str, str | bytes | list[bytes]]:
    fields: dict[str, str | bytes | list[bytes]] = {}
    for sent_as, value in items:
        name = sent_as.removesuffix("[]")
        content = value if isinstance(value, str) else value.file.read()
        if not isinstance(value, str) and not value.filename and not content:
            continue
        before = fields.get(name)
        if before is None:
            fields[name] = content
        elif name == MANY and sent_as != name and isinstance(content, bytes) and not isinstance(before, str):
            fields[name] = [*(before if isinstance(before, list) else [before]), content]
        else:
            advice = f"send one, or all as {MANY}[]" if name == MANY else "send one"
            message = f"{name[:100]} is there more than once; {advice}"
            raise Refusal(400, InvalidRequest.code, message, name)
    return fields
