"""Names of requests: no two alike, and whose each is can be told from it alone, by any router."""

from __future__ import annotations

import hmac
from secrets import token_hex

_NONCE, _TAG = 8, 16  # in hexadecimal digits


def new_id(request_id: str, owner: bytes) -> str:
    """A name that begins with `request_id`, which clients may choose and choose again."""
    name = f"{request_id}-{token_hex(_NONCE // 2)}"
    return name + _tag(name, owner)


def is_of(name: str, owner: bytes) -> bool:
    """Whether `new_id` made `name` for `owner`."""
    begun, tag = name[:-_TAG], name[-_TAG:]
    return hmac.compare_digest(tag.encode(), _tag(begun, owner).encode())


def _tag(name: str, owner: bytes) -> str:
    return hmac.new(owner, name.encode(), "sha256").hexdigest()[:_TAG]
