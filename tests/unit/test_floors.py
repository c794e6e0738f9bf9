"""`constraints-lowest.txt` tries the versions that `pyproject.toml` calls the lowest."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
NOT_TRIED = {"torch", "triton"}


def test_the_lowest_versions_are_tried() -> None:
    wanted = [*PROJECT["dependencies"], *EXTRAS["dev"], *EXTRAS["browser"]]
    floors = dict(re.findall(r"^([\w-]+)(?:\[\w+\])?>=([\d.]+)", "\n".join(wanted), re.MULTILINE))
    lowest = (ROOT / "constraints-lowest.txt").read_text()
    tried = dict(re.findall(r"^([\w-]+)==([\d.]+)$", lowest, re.MULTILINE))
    assert len(floors) == len(wanted) and tried.keys() == floors.keys()
    for name in floors.keys() - NOT_TRIED:
        assert re.fullmatch(re.escape(floors[name]) + r"(\.0)*", tried[name]), name
