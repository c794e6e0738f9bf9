"""Arguments of command lines that cannot be used, refused before anything is begun."""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from math import inf, nan
from pathlib import Path


def at_least(least: int) -> Callable[[str], int]:
    """An argument's type: an integer that is not below `least`."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is no integer") from None
        if value < least:
            raise ArgumentTypeError(f"{value} is too few; use {least} or more")
        return value

    return integer


positive = at_least(1)


def positive_number(text: str) -> float:
    """An argument's type: a finite number above 0."""
    if not 0.0 < (value := _number(text)) < inf:
        raise ArgumentTypeError(f"{text!r} is no positive number")
    return value


def non_negative_number(text: str) -> float:
    """An argument's type: a finite number that is 0 or more."""
    if not 0.0 <= (value := _number(text)) < inf:
        raise ArgumentTypeError(f"{text!r} is no number of 0 or more")
    return value


def _number(text: str) -> float:
    """A number, or nan, which every comparison refuses."""
    try:
        return float(text)
    except ValueError:
        return nan


def writable(path: str) -> Path:
    """An argument's type: a file that can be written, in a folder that is made if there is none."""
    if why := obstacle_to_writing(file := Path(path)):
        raise ArgumentTypeError(f"{path}: {why}")
    return file


def obstacle_to_writing(file: Path) -> str | None:
    """Why a file cannot be written, and what to do; makes its folder. None if it can."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"no folder {file.parent} can be made: {error.strerror}; name a file elsewhere"
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        return "it cannot be written; name a file in a folder that can be"
    return None
