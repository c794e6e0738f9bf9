"""How a process comes to Ray, a cluster that runs already or one that it starts, and leaves it."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private.services import get_ray_address_from_environment
from ray._private.utils import get_ray_address_file

PATIENCE_S = 5.0
_PLACE = re.compile(r"(\[[^]\s]+]|[^/\s:]+):(\d+)")


def join(address: str) -> None:
    """Connect this process to the cluster at `address`, as `ray.init` takes it.

    Args:
        address: `host:port`, or `auto`, which is RAY_ADDRESS of the environment, else one on this machine.

    Raises:
        ConnectionError: there is none. Ray by itself would ask for minutes.
    """
    meant, whence = _found() if address == "auto" else (address, "")
    if place := _PLACE.fullmatch(meant):
        try:
            socket.create_connection((place[1].strip("[]"), int(place[2])), PATIENCE_S).close()
        except (OSError, OverflowError, UnicodeError) as error:
            raise ConnectionError(f"no Ray cluster answers at {meant}{whence}: {error}") from error
    with own_sigterm():
        ray.init(address, logging_level="ERROR", log_to_driver=False)


def leave() -> None:
    """Disconnect this process from its cluster, and end what it has started of that.

    What `deaf_to_sigterm` started has nothing to save; Ray would wait a second for each process of it.
    """
    node = ray._private.worker._global_node
    if node is not None:
        kill = node.kill_all_processes
        node.kill_all_processes = lambda **_: kill(check_alive=False)
    with deaf_to_sigterm(), own_sigterm():
        ray.shutdown()


@contextmanager
def own_sigterm() -> Iterator[None]:
    """Begin or end Ray in the block, and let a SIGTERM mean to this process what it meant before.

    Ray's own handler prints a stack and aborts the process 3 s later, whatever that has to give back still.
    Where the program has none, a SIGTERM raises SystemExit, as in Ray's. At its end Ray takes away any.
    """
    former = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # no other may
            rays = signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, rays if former in (signal.SIG_DFL, None) else former)


@contextmanager
def deaf_to_sigterm() -> Iterator[None]:
    """What is started in the block hears no SIGTERM, as nothing that Ray starts hears a Ctrl-C.

    systemd, among others, sends one to all processes of a program at once. The program says what it means for
    them: Ray's servers would leave it waiting for them, for a minute.
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _found() -> tuple[str, str]:
    """The address that Ray takes `auto` for, and what to do about it where a file of Ray's alone says so.

    That file is left behind by a cluster that was killed.
    """
    meant = get_ray_address_from_environment("auto", None)
    if os.environ.get("RAY_ADDRESS"):
        return meant, ""
    file = get_ray_address_file(None)
    return meant, f", which {file} names (if it is of a cluster that is no more, delete that file)"
