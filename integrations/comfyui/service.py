"""A distriray service over HTTP, with what Python itself has."""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import SplitResult, urlsplit

KEY_VARIABLE, URL_VARIABLE = "DISTRIRAY_API_KEY", "DISTRIRAY_URL"
DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_S = 10.0
POLL_S = 0.25  # between two looks whether the user has cancelled
SILENCE_S = 60.0  # after which a stream is taken for dead: the service says something every 15

Fields = dict[str, Any]


def own_url() -> str:
    """The service that the key is for, and that nodes name until they are told another."""
    return os.environ.get(URL_VARIABLE, "").strip() or DEFAULT_URL


class ServiceError(RuntimeError):
    """What the service has against a request, in its own words."""


def events(url: str, path: str, fields: Fields, check: Callable[[], None]) -> Iterator[Fields]:
    """The events of a request, the last of which has the picture.

    `check` is called a few times a second and may raise; then, as when the iterator is closed, the service
    hears that nobody waits any more.

    Raises:
        ServiceError: the service refused or failed, or cannot be reached.
    """
    connection, key = _connection(url), _key_for(url)
    headers: dict[str, str | bytes] = {"Content-Type": "application/json", "Accept": "text/event-stream"}
    if key:
        headers["Authorization"] = f"Bearer {key}".encode()
    news: queue.Queue[Fields | Exception | None] = queue.Queue()
    left = threading.Event()
    whole, body = urlsplit(url).path.rstrip("/") + path, json.dumps(fields).encode()
    ask = partial(connection.request, "POST", whole, body, headers)
    threading.Thread(target=_follow, args=(url, connection, ask, news, left), daemon=True).start()
    try:
        while True:
            check()
            try:
                event = news.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if event is None:
                raise ServiceError("the service broke off before the picture was finished")
            if isinstance(event, Exception):
                raise event
            if event["type"] == "error":
                raise ServiceError(_told(event["error"]))
            yield event
            if event["type"].endswith(".completed"):
                return
    finally:
        left.set()
        if (open_yet := connection.sock) is not None:
            with suppress(OSError):  # it is closed meanwhile
                open_yet.shutdown(socket.SHUT_RDWR)  # which wakes whoever waits for it


def _connection(url: str) -> HTTPConnection:
    parts = _parts(url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    return kind(parts.hostname, parts.port, timeout=CONNECT_S)


def _parts(url: str) -> SplitResult:
    """The parts of a service's address; raises ServiceError."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    except ValueError:  # a port that is no number, or half a bracket
        pass
    raise ServiceError(f"{url!r} is no address of a service; write one such as {DEFAULT_URL}")


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
    parts = _parts(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _follow(
    url: str,
    connection: HTTPConnection,
    ask: Callable[[], None],
    news: queue.Queue[Fields | Exception | None],
    left: threading.Event,
) -> None:
    """Ask, and put what is heard into `news`, whose end is None or an exception; not if `left` is set before.

    In a thread of its own, since a service may not say anything, nor take what is sent.
    """
    try:
        try:
            connection.connect()
            if left.is_set():  # whoever left before found nothing to shut
                return
            to_service = connection.sock
            to_service.settimeout(None)  # it may be busy; `check` is for the impatient
            ask()
            answer = connection.getresponse()
            to_service.settimeout(SILENCE_S)
        except (OSError, HTTPException, ValueError) as error:
            raise ServiceError(f"{url} cannot be reached: {error}") from error
        try:
            _check(answer)
            for line in answer:
                if line.startswith(b"data:"):
                    news.put(json.loads(line[5:]))
        except (OSError, HTTPException, ValueError) as error:
            raise ServiceError(f"the connection to {url} broke: {error}") from error
        news.put(None)
    except Exception as error:
        news.put(error)
    finally:
        connection.close()


def _check(answer: HTTPResponse) -> None:
    """Raise ServiceError, with what it says, unless it is a stream of events."""
    if answer.status == 200 and answer.headers.get_content_type() == "text/event-stream":
        return
    text = answer.read()
    try:
        told = _told(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        told = f"the service answered {answer.status}: {text[:200].decode(errors='replace')}"
    raise ServiceError(told)


def _told(error: Fields) -> str:
    message = str(error["message"])
    param = error.get("param")
    return message if not param or param in message else f"{param}: {message}"
