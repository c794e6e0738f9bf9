"""Gangs on Ray: workers that hold a pipeline each, and hosts that lend gangs out of them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distriray.gang.blocking import BlockingHost as BlockingHost
    from distriray.gang.blocking import open_host as open_host
    from distriray.gang.config import HostConfig as HostConfig
    from distriray.gang.host import Host as Host

_HOMES = {
    "BlockingHost": "blocking",
    "Host": "host",
    "HostConfig": "config",
    "open_host": "blocking",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
