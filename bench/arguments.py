"""What the commands of this folder take from a command line, refused there if it cannot be."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def at_least(least: int) -> Callable[[str], int]:
    """An argument's type: an integer that is not below `least`."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no integer") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too few; use {least} or more")
        return value

    return integer


positive = at_least(1)


def measurement(path: str) -> dict[str, Any]:
    """An argument's type: what a bench's `--json` wrote."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict) or "rows" not in found:
        raise argparse.ArgumentTypeError(f"{path} has no rows; it was not written by a bench's --json")
    return found
