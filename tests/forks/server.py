"""Imports the modules of its arguments, says so, and forks for each that asks, until its input ends."""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from tests.forks import ADDRESS


@dataclass(frozen=True)
class Fork:
    """A worker, and who asked for it."""

    pid: int
    pidfd: int
    asker: socket.socket


class Server:
    def __init__(self, address: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(64)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(sys.stdin, selectors.EVENT_READ)
        self._forks: set[Fork] = set()

    def run(self) -> None:
        """Fork, hand on how forks end, and kill those whose asker was killed; in the end, all."""
        try:
            self._run()
        finally:
            for fork in self._forks:
                os.kill(fork.pid, signal.SIGKILL)

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is sys.stdin:
                    return
                if key.fileobj is self._listener:
                    self._fork()
                elif key.data in self._forks:
                    if key.fileobj is key.data.asker:
                        os.kill(key.data.pid, signal.SIGKILL)
                    self._end(key.data)

    def _fork(self) -> None:
        asker, _ = self._listener.accept()
        head, streams, _, _ = socket.recv_fds(asker, 4, 3)
        said = asker.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
        pid = os.fork()  # also if the asker was killed meanwhile: the child then fails, as every worker may
        if not pid:
            self._selector.close()
            self._listener.close()
            asker.close()
            for fork in self._forks:
                fork.asker.close()
                os.close(fork.pidfd)
            become(said, streams)
        for stream in streams:
            os.close(stream)
        fork = Fork(pid, os.pidfd_open(pid), asker)
        self._forks.add(fork)
        self._selector.register(fork.pidfd, selectors.EVENT_READ, fork)
        self._selector.register(asker, selectors.EVENT_READ, fork)

    def _end(self, fork: Fork) -> None:
        """Wait for its end, and tell the asker."""
        _, status = os.waitpid(fork.pid, 0)
        with suppress(OSError):
            fork.asker.sendall(status.to_bytes(4, "big"))
        self._selector.unregister(fork.asker)
        self._selector.unregister(fork.pidfd)
        fork.asker.close()
        os.close(fork.pidfd)
        self._forks.remove(fork)


def become(said: bytes, streams: list[int]) -> NoReturn:
    """Run the script that was asked for, and end as soon as it does: a worker leaves nothing for later."""
    code = 1
    try:
        os.setpgid(0, 0)  # Ray kills the whole process group of a worker that has died
        asked = json.loads(said)
        for own, stream in enumerate(streams):
            os.dup2(stream, own)
            os.close(stream)
        os.environ.clear()
        os.environ.update(asked["environ"])
        os.chdir(asked["folder"])
        sys.argv = asked["argv"]
        sys.path[:0] = [os.path.dirname(sys.argv[0]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def main() -> None:
    for module in sys.argv[1:]:
        importlib.import_module(module)
    assert "ray" not in sys.modules, "it does not connect in a process that is forked from here"
    gc.collect()
    gc.freeze()  # what a fork never changes stays shared
    server = Server(os.environ[ADDRESS])
    print("ready", flush=True)
    server.run()


if __name__ == "__main__":
    main()
