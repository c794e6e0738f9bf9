"""What a configuration lists and requests ask for by name: adapters, ControlNets and IP-Adapters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from distriray.errors import (
    AdapterNotFound,
    ControlNetNotFound,
    DistrirayError,
    InvalidRequest,
    IPAdapterNotFound,
)

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
"""What a name looks like; no path does."""

MOST_LOADED = 16
"""ControlNets, or IP-Adapters, that a pool may list: each worker has all of them in its device's memory."""

MOST_SHOWN = 20
"""Names in the message of an unknown one."""


class Named(Protocol):
    """A thing of a configuration, or what a request asks of it."""

    @property
    def name(self) -> str: ...


class Kind(NamedTuple):
    """A kind of what has a name.

    Attributes:
        word: for one of them.
        option: the field of a configuration that lists them; `max_` before it is the limit of a request.
        unknown: the error for a name that is not known, whose message lists those that are.
    """

    word: str
    option: str
    unknown: type[DistrirayError]


KINDS = {
    "loras": Kind("adapter", "loras", AdapterNotFound),
    "control": Kind("ControlNet", "controls", ControlNetNotFound),
    "ip_adapters": Kind("IP-Adapter", "ip_adapters", IPAdapterNotFound),
}
"""By the field of a request that names them."""

REFUSALS: tuple[type[DistrirayError], ...] = (InvalidRequest, *(kind.unknown for kind in KINDS.values()))
"""The errors that `check_names` raises."""


def check_unique(option: str, listed: Iterable[Named], word: str) -> None:
    """Raise ValueError where a name is listed more than once in the field `option` of a configuration."""
    names = [each.name for each in listed]
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{option} {double} are there more than once; give each {word} a name of its own")


def check_names(field: str, asked: Iterable[Named], known: Iterable[str]) -> None:
    """Check what a request names in `field`, one of `KINDS`, against the names that are known.

    Raises:
        AdapterNotFound, ControlNetNotFound, IPAdapterNotFound: one is not known.
        InvalidRequest: one is named more than once.
    """
    names, known, kind = [each.name for each in asked], sorted(known), KINDS[field]
    for name in names:
        if name not in known:
            there_is = f"there is {_listing(known)}" if known else "there is none here"
            raise kind.unknown(f"no {kind.word} {name!r}; {there_is}")
        if names.count(name) > 1:
            raise InvalidRequest(f"{field} names {name!r} more than once", field)


def _listing(names: list[str]) -> str:
    more = len(names) - MOST_SHOWN
    rest = f" and {more} more, which GET /v1/models lists" if more > 0 else ""
    return ", ".join(map(repr, names[:MOST_SHOWN])) + rest
