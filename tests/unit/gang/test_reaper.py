"""Who is ended with a local Ray, and who is not."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from distriray.gang import reaper

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.mark.distributed
def test_what_the_program_started_itself_goes_on_without_its_ray() -> None:
    own = subprocess.Popen(SLEEP)
    others = reaper.children()
    rays = subprocess.Popen(SLEEP)
    try:
        reaper.start(others).communicate()
        assert rays.wait(timeout=10) == -signal.SIGKILL
        assert own.poll() is None
    finally:
        for process in (own, rays):
            process.kill()
            process.wait()
