"""What schemathesis finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx

from distriray.requests import SamplingParams

_FORMS = "/images/(edits|variations)$"


def schemathesis(url: str, key: str, examples: int, folder: Path) -> None:
    """Compare a running service with the document it serves: every check, valid and invalid data.

    Raises AssertionError, with all that it prints, if it finds a violation.
    """
    document = httpx.get(f"{url}/openapi.json").raise_for_status().json()
    for name in SamplingParams.WITH_IMAGES:  # what a picture is, a schema cannot say: none is listed
        listed = document["components"]["schemas"]["ImageRequest"]["properties"][name]["anyOf"][0]
        listed["maxItems"] = 0
    (folder / "openapi.json").write_text(json.dumps(document))
    # A stream of events ends after a minute.
    apart = ["--exclude-path-regex", f"{_FORMS}|/fleet/events$"]
    options = [*apart, "-n", str(examples), "--phases", "examples,coverage,fuzzing"]
    _run(["openapi.json", "--url", url], key, options, folder)


def schemathesis_of_forms(url: str, key: str, examples: int, folder: Path) -> None:
    """The same of forms, by fuzzing alone: on files in forms its phase of coverage fails by itself."""
    only = ["--include-path-regex", _FORMS, "-n", str(examples), "--phases", "fuzzing"]
    pictures = {"SCHEMATHESIS_HOOKS": str(Path(__file__).with_name("forms.py"))}
    _run([f"{url}/openapi.json"], key, only, folder, pictures)


def _run(
    document: list[str], key: str, options: list[str], folder: Path, variables: dict[str, str] | None = None
) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", *document, "--no-color"]
    checked = ["--seed", "1", "--checks", "all", "--suppress-health-check", "all", "--request-timeout", "60"]
    done = subprocess.run(
        [*command, *checked, *options, "-H", f"Authorization: Bearer {key}"],
        cwd=folder,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, **(variables or {})},
    )
    assert done.returncode == 0, done.stdout + done.stderr
