"""What the commands of this folder take from a command line, refused there if it cannot be."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from distriray.arguments import positive, writable

SIDE_UNIT = 16
"""Pixels of a token of most networks, of two latents; a side of something else would be rounded down."""


def add_json(parser: argparse.ArgumentParser) -> None:
    """Give a command its `--json`, refused before anything is measured where nothing can be written."""
    parser.add_argument("--json", type=writable, help="also write what was measured to this file")


def add_backends(parser: argparse.ArgumentParser) -> None:
    """Give a command its `--backends`, those that several ranks on CPUs can have."""
    from distriray.collective.registry import BACKENDS  # with torch, which some commands do without

    there = [name for name, backend in BACKENDS.items() if backend.device == "cpu"]
    parser.add_argument("--backends", nargs="+", choices=there, default=["shm", "gloo"])


def side(text: str) -> int:
    """An argument's type: pixels of a side, which every network makes whole tokens of."""
    pixels = positive(text)
    if rest := pixels % SIDE_UNIT:
        below = f"{pixels - rest} or " if pixels > rest else ""
        raise argparse.ArgumentTypeError(
            f"{pixels} is not a multiple of {SIDE_UNIT}; use {below}{pixels - rest + SIDE_UNIT}"
        )
    return pixels


def measurement(path: str) -> dict[str, Any]:
    """An argument's type: what a bench's `--json` wrote."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict) or "rows" not in found:
        raise argparse.ArgumentTypeError(f"{path} has no rows; it was not written by a bench's --json")
    return found
