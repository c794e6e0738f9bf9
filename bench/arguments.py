"""What the commands of this folder take from a command line, refused there if it cannot be."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from distriray.arguments import writable


def add_json(parser: argparse.ArgumentParser) -> None:
    """Give a command its `--json`, refused before anything is measured where nothing can be written."""
    parser.add_argument("--json", type=writable, help="also write what was measured to this file")


def measurement(path: str) -> dict[str, Any]:
    """An argument's type: what a bench's `--json` wrote."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict) or "rows" not in found:
        raise argparse.ArgumentTypeError(f"{path} has no rows; it was not written by a bench's --json")
    return found
