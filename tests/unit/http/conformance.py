"""What schemathesis finds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx

from distriray.requests import SamplingParams


def schemathesis(url: str, key: str, examples: int, folder: Path) -> None:
    """Compare a running service with the document it serves: every check, valid and invalid data.

    Raises AssertionError, with all that it prints, if it finds a violation.
    """
    document = httpx.get(f"{url}/openapi.json").raise_for_status().json()
    for name in SamplingParams.WITH_IMAGES:
        listed = document["components"]["schemas"]["ImageRequest"]["properties"][name]["anyOf"][0]
        listed["maxItems"] = 0
    (folder / "openapi.json").write_text(json.dumps(document))
    command = [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", url, "--no-color"]
    options = ["-n", str(examples), "--seed", "1", "--phases", "examples,coverage,fuzzing", "--checks", "all"]
    # What a picture is, a schema cannot say, so none is listed above; a stream of events ends after a minute.
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
