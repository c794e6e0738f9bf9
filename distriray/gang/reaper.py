"""Ends what a local Ray leaves behind when its driver is killed.

Ray ends its own processes when their driver dies, but in Ray 2.60 two agents wait a minute for the head
that died with them. This process waits for the end of its standard input, which comes with the driver's, and
kills what is left.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection
from contextlib import suppress

import psutil


def children() -> set[psutil.Process]:
    """Processes that this one has started and that are there now."""
    return set(psutil.Process().children())


def start(others: Collection[psutil.Process] = ()) -> subprocess.Popen[str]:
    """Watch this process' children but `others`, and their descendants; close `stdin` to end those left.

    Args:
        others: children from before the local Ray, which are the program's own, as what they start is.
    """
    started = []
    for child in children().difference(others):
        with suppress(psutil.NoSuchProcess):
            family = (child, *child.children(recursive=True))
            started += [(process.pid, process.create_time()) for process in family]
    watcher = subprocess.Popen(
        [sys.executable, "-m", __name__], stdin=subprocess.PIPE, text=True, start_new_session=True
    )
    assert watcher.stdin is not None
    watcher.stdin.write(json.dumps(started) + "\n")
    watcher.stdin.flush()
    return watcher


def main() -> None:
    """Wait for the driver's end, and end what it started."""
    started = json.loads(sys.stdin.readline())
    sys.stdin.read()
    for pid, created in started:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() == created:
                process.kill()


if __name__ == "__main__":
    main()
