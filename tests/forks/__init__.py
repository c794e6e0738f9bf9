"""Workers of a local Ray as forks of one process that has imported what they import.

Ray starts a worker by a command, `py_executable` of its runtime environment. Here it is `ask.py`, which
hands arguments, environment, folder and standard streams to `server.py` and waits; the server forks, and its
child becomes the worker.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

ADDRESS = "DISTRIRAY_TEST_FORKS"  # names the server's socket

# Not Ray itself: it does not connect in a process that was forked after its import.
IMPORTED = ("distriray.parallel", "distriray.denoise", "diffusers.pipelines.stable_diffusion_xl")


def ask_for_workers(runtime_env: dict[str, Any] | None) -> dict[str, Any]:
    """What `RAY_RUNTIME_ENV_HOOK` names: the runtime environment of a program that starts or joins a Ray."""
    command = shlex.join([sys.executable, "-SE", str(Path(__file__).with_name("ask.py"))])
    # With a variable: Serve adds empty `env_vars` on the way, and would take that for a change.
    return {"py_executable": command, "env_vars": {ADDRESS: os.environ[ADDRESS]}, **(runtime_env or {})}


@contextmanager
def forked_workers(folder: Path) -> Iterator[None]:
    """Have every Ray that this process and its children start fork its workers.

    Args:
        folder: for the server's socket; its path should be short.
    """
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.getenv("PYTHONPATH")])]
    ours = {
        ADDRESS: str(folder / "forks"),
        "PYTHONPATH": os.pathsep.join(paths),
        "RAY_RUNTIME_ENV_HOOK": f"{__name__}.{ask_for_workers.__name__}",
    }
    with patch.dict(os.environ, ours):
        server = subprocess.Popen(
            [sys.executable, "-m", f"{__name__}.server", *IMPORTED],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # torch reads it when it is imported
        )
        assert server.stdout is not None
        with server:  # which closes its input, and waits for it
            assert server.stdout.readline(), "the server of forks did not start"
            yield
