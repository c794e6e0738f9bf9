"""What the commands of this folder take from a command line, refused there if it cannot be."""

from __future__ import annotations

import argparse
import json
import os
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


def add_json(parser: argparse.ArgumentParser) -> None:
    """Give a command its `--json`, refused before anything is measured where nothing can be written."""
    parser.add_argument("--json", type=_writable, help="also write what was measured to this file")


def _writable(path: str) -> Path:
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"no folder {file.parent} can be made: {error.strerror}") from None
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be written; name a file in a folder that can be")
    return file


def measurement(path: str) -> dict[str, Any]:
    """An argument's type: what a bench's `--json` wrote."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict) or "rows" not in found:
        raise argparse.ArgumentTypeError(f"{path} has no rows; it was not written by a bench's --json")
    return found
