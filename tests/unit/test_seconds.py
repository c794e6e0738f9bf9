"""What is left to `make test` for the time that it takes is there."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.conftest import SECONDS

ROOT = Path(__file__).parents[2]


def test_every_function_that_is_listed_as_long_exists() -> None:
    for path, names in listed().items():
        there = {
            node.name
            for node in ast.walk(ast.parse((ROOT / path).read_text()))
            if isinstance(node, ast.FunctionDef)
        }
        assert names <= there, (path, names - there)


def listed() -> dict[str, set[str]]:
    """By file."""
    files: dict[str, set[str]] = {}
    for line in SECONDS.read_text().split():
        path, _, name = line.partition("::")
        files.setdefault(path, set()).add(name)
    return files
