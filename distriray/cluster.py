"""A Ray cluster that runs already."""

from __future__ import annotations

import re
import socket

import ray

PATIENCE_S = 5.0
_PLACE = re.compile(r"([^/\s:]+):(\d+)")


def join(address: str) -> None:
    """Connect this process to the cluster at `address`, as `ray.init` takes it: `host:port`, or `auto`.

    Raises:
        ConnectionError: there is none. Ray by itself would ask for minutes.
    """
    if place := _PLACE.fullmatch(address):
        try:
            socket.create_connection((place[1], int(place[2])), PATIENCE_S).close()
        except (OSError, OverflowError) as error:
            raise ConnectionError(f"no Ray cluster answers at {address}: {error}") from error
    ray.init(address, logging_level="ERROR", log_to_driver=False)
