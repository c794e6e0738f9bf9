"""A Ray cluster that runs already."""

from __future__ import annotations

import os
import re
import socket

import ray

PATIENCE_S = 5.0
_PLACE = re.compile(r"(\[[^]\s]+]|[^/\s:]+):(\d+)")


def join(address: str) -> None:
    """Connect this process to the cluster at `address`, as `ray.init` takes it.

    Args:
        address: `host:port`, or `auto`, which is RAY_ADDRESS of the environment, else one on this machine.

    Raises:
        ConnectionError: there is none. Ray by itself would ask for minutes.
    """
    meant = os.environ.get("RAY_ADDRESS") or address if address == "auto" else address
    if place := _PLACE.fullmatch(meant):
        try:
            socket.create_connection((place[1].strip("[]"), int(place[2])), PATIENCE_S).close()
        except (OSError, OverflowError, UnicodeError) as error:
            raise ConnectionError(f"no Ray cluster answers at {meant}: {error}") from error
    ray.init(address, logging_level="ERROR", log_to_driver=False)
