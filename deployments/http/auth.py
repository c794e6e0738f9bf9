"""Authentication: holders of a key are answered, or this machine alone."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from ipaddress import ip_address
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from deployments.http.config import HttpConfig
from deployments.http.errors import Refusal
from distriray.wire import Code

_PROXIED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")

_bearer = HTTPBearer(auto_error=False, description="A key of the service: `Authorization: Bearer KEY`.")
_Credentials = Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]


def require_key(config: HttpConfig) -> Callable[..., Any]:
    """A dependency that raises Refusal (401) for whoever may not ask; `request.state.owner` is who asks.

    Raises:
        ValueError, OSError: as `HttpConfig.keys`.
    """
    keys = config.keys()
    return _holders_of(keys) if keys else _this_machine(config)


def _holders_of(keys: list[str]) -> Callable[..., Any]:
    digests = [_digest(key.encode()) for key in keys]

    async def holders_of_a_key(request: Request, credentials: _Credentials) -> None:
        headers = {"WWW-Authenticate": "Bearer"}
        if credentials is None:
            message = "a key is needed; send it as the header Authorization: Bearer KEY"
            raise Refusal(401, Code.MISSING_KEY, message, headers=headers)
        # Headers are read as latin-1. Digests are compared, and all of them: time tells nothing of a key.
        given = _digest(credentials.credentials.encode("latin-1", "replace"))
        matches = [hmac.compare_digest(given, digest) for digest in digests]
        if True not in matches:
            raise Refusal(401, Code.INVALID_KEY, "this key is not one of the service's", headers=headers)
        request.state.owner = given

    return holders_of_a_key


def _this_machine(config: HttpConfig) -> Callable[..., Any]:
    allowed = {*config.cors_origins}
    mend = f"set the environment variable {config.keys_env} or keys_file, then send a key"

    async def this_machine(request: Request) -> None:
        # A proxy on this machine looks like a client on it, and so does a web page that rebinds its name.
        # Browsers here send forms for pages from anywhere, which only cannot read the answer.
        client = request.client.host if request.client else None
        named = _host_name(request.headers.get("host", ""))
        origin = request.headers.get("origin")
        asking = _host_name((origin or "").partition("://")[2])
        proxied = next((name for name in _PROXIED if name in request.headers), None)
        if proxied is not None:
            reason = f"this request came through a proxy (header {proxied})"
        elif not _is_loopback(client):
            reason = f"{client or 'an unknown address'} is another machine"
        elif not _is_loopback(named):
            reason = f"this request names the host {named or 'wrongly'}"
        elif origin is not None and not ({origin, "*"} & allowed or _is_loopback(asking)):
            reason = f"a page of {origin[:100]}, which is not one of cors_origins, asks"
        else:
            request.state.owner = b""
            return
        message = (
            f"without keys only clients on this machine are answered, at localhost, and {reason}; {mend}"
        )
        raise Refusal(401, Code.NO_KEYS, message, headers={"WWW-Authenticate": "Bearer"})

    return this_machine


def _host_name(header: str) -> str | None:
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None


def _is_loopback(host: str | None) -> bool:
    if host is None:
        return False
    if host.lower() == "localhost":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
