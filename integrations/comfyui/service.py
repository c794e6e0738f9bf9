"""A distriray service over HTTP, with what Python itself has."""

from __future__ import annotations

import json
import os
import queue
import threading
import uuid
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

KEY_VARIABLE, URL_VARIABLE = "DISTRIRAY_API_KEY", "DISTRIRAY_URL"
DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_S = 10.0
POLL_S = 0.25  # between two looks whether the user has cancelled

Fields = dict[str, Any]
Files = dict[str, bytes]


def own_url() -> str:
    """The service that the key is for, and that nodes name until they are told another."""
    return os.environ.get(URL_VARIABLE, "").strip() or DEFAULT_URL


class ServiceError(RuntimeError):
    """What the service has against a request, in its own words."""


def events(
    url: str, path: str, fields: Fields, files: Files | None, check: Callable[[], None]
) -> Iterator[Fields]:
    """The events of a request, the last of which has the picture.

    `check` is called a few times a second and may raise; then, as when the iterator is closed, the service
    hears that nobody waits any more.

    Args:
        files: PNGs by field; with them the request is a form.

    Raises:
        ServiceError: the service refused or failed, or cannot be reached.
    """
    connection, key = _connection(url), _key_for(url)
    news: queue.Queue[Fields | Exception | None] = queue.Queue()
    try:
        answer = _ask(connection, urlsplit(url).path.rstrip("/") + path, fields, files, key)
        threading.Thread(target=_read, args=(answer, news), daemon=True).start()
        while True:
            check()
            try:
                event = news.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if event is None:
                raise ServiceError("the service broke off before the picture was finished")
            if isinstance(event, Exception):
                raise ServiceError(f"the connection to {url} broke: {event}") from event
            if event["type"] == "error":
                raise ServiceError(_told(event["error"]))
            yield event
            if event["type"].endswith(".completed"):
                return
    except (OSError, HTTPException) as error:
        raise ServiceError(f"{url} cannot be reached: {error}") from error
    finally:
        if connection.sock is not None:
            connection.sock.close()
        connection.close()


def _connection(url: str) -> HTTPConnection:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ServiceError(f"{url!r} is no address of a service; write one such as http://127.0.0.1:8000")
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    return kind(parts.hostname, parts.port, timeout=CONNECT_S)


def _key_for(url: str) -> str | None:
    """The key, if there is one; raises ServiceError for a service that it is not for.

    Workflows come from anywhere, in pictures too, and bring their address along.
    """
    key, own = os.environ.get(KEY_VARIABLE), own_url()
    if not key:
        return None
    if _origin(url) != _origin(own):
        raise ServiceError(
            f"the key in {KEY_VARIABLE} is for {own}, and this node names {url}; if the key is for that "
            f"service, set {URL_VARIABLE} to it where ComfyUI runs"
        )
    if key != key.strip() or not key.isprintable():  # which Python would quote, key and all
        raise ServiceError(
            f"the environment variable {KEY_VARIABLE} has a blank at an end, or the end of a line"
        )
    return key


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _ask(
    connection: HTTPConnection, path: str, fields: Fields, files: Files | None, key: str | None
) -> HTTPResponse:
    if files:
        body, content_type = _form(fields, files)
    else:
        body, content_type = json.dumps(fields).encode(), "application/json"
    headers = {"Content-Type": content_type, "Accept": "text/event-stream"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    connection.connect()
    connection.sock.settimeout(None)  # a picture takes as long as it takes; `check` is for the impatient
    connection.request("POST", path, body, headers)
    answer = connection.getresponse()
    if answer.status == 200:
        return answer
    text = answer.read()
    try:
        raise ServiceError(_told(json.loads(text)["error"]))
    except (ValueError, KeyError, TypeError):
        shown = text[:200].decode(errors="replace")
        raise ServiceError(f"the service answered {answer.status}: {shown}") from None


def _read(answer: HTTPResponse, news: queue.Queue[Fields | Exception | None]) -> None:
    try:
        for line in answer:
            if line.startswith(b"data:"):
                news.put(json.loads(line[5:]))
        news.put(None)
    except Exception as error:  # of a connection that may have been closed on purpose
        news.put(error)


def _form(fields: Fields, files: Files) -> tuple[bytes, str]:
    boundary = uuid.uuid4().hex
    parts = []
    for name, value in fields.items():
        text = value if isinstance(value, str) else json.dumps(value)
        parts.append(f'Content-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + text.encode())
    for name, content in files.items():
        head = f'Content-Disposition: form-data; name="{name}"; filename="{name}.png"\r\n'
        parts.append(f"{head}Content-Type: image/png\r\n\r\n".encode() + content)
    mark = f"--{boundary}".encode()
    body = b"".join(mark + b"\r\n" + part + b"\r\n" for part in parts) + mark + b"--\r\n"
    return body, f"multipart/form-data; boundary={boundary}"


def _told(error: Fields) -> str:
    message = str(error["message"])
    param = error.get("param")
    return message if not param or param in message else f"{param}: {message}"
