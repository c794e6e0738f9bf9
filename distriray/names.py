"""The names of what a configuration lists and requests ask for."""

from __future__ import annotations

from collections.abc import Iterable

from .errors import DistrirayError, InvalidRequest

MOST_LISTED = 20
"""Names in the message of an unknown one."""


def check_unique(field: str, names: Iterable[str], what: str) -> None:
    """Raise ValueError where a name is listed more than once; `what` is named in `field`."""
    names = list(names)
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{field} {double} are there more than once; give each {what} a name of its own")


def check_named(
    field: str, names: Iterable[str], known: Iterable[str], what: str, unknown: type[DistrirayError]
) -> None:
    """Check what a request names in `field`.

    Args:
        what: is named, in a word.
        unknown: the error for a name that is not known, whose message lists those that are.

    Raises:
        InvalidRequest: something is named more than once.
    """
    names, known = list(names), list(known)
    for name in names:
        if name not in known:
            there_is = f"there is {_listing(known)}" if known else "there is none here"
            raise unknown(f"no {what} {name!r}; {there_is}")
        if names.count(name) > 1:
            raise InvalidRequest(f"{field} names {name!r} more than once", field)


def _listing(names: list[str]) -> str:
    more = len(names) - MOST_LISTED
    rest = f" and {more} more, which GET /v1/models lists" if more > 0 else ""
    return ", ".join(map(repr, names[:MOST_LISTED])) + rest
