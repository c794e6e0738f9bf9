"""What schemathesis finds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def schemathesis(url: str, key: str, examples: int, folder: Path) -> None:
    """Compare a running service with the document it serves: every check, valid and invalid data.

    Raises AssertionError, with all that it prints, if it finds a violation.
    """
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--no-color"]
    options = ["-n", str(examples), "--seed", "1", "--phases", "examples,coverage,fuzzing", "--checks", "all"]
    # What a picture is, a schema cannot say; and a stream of events ends after a minute.
    options += ["--exclude-path-regex", "/images/(edits|variations)$|/fleet/events$"]
    quiet = [
        "--suppress-health-check",
        "all",
        "--request-timeout",
        "60",
        "-H",
        f"Authorization: Bearer {key}",
    ]
    done = subprocess.run([*command, *options, *quiet], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
