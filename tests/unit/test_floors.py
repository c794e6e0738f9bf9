"""Versions of libraries: those that are called the lowest are tried, and newer ones than known are told."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import diffusers
import pytest

from distriray import parallelize
from distriray.collective import connect
from distriray.parallel.parallelize import DIFFUSERS
from tests.models import tiny_sdxl

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


def test_a_newer_diffusers_than_gangs_were_compared_with_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pinned = re.search(r"^diffusers==(\d+)\.(\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None and tuple(map(int, pinned.groups())) == DIFFUSERS
    major, minor = DIFFUSERS
    pipeline = tiny_sdxl()
    newer = f"{major}.{minor + 1}.0.dev0", f"{major + 1}.0.0"
    for told, version in enumerate((f"{major}.{minor}.9", *newer)):
        monkeypatch.setattr(diffusers, "__version__", version)
        parallelize(pipeline, connect("local"))
        parallelize(pipeline, connect("local"))
        assert len(caplog.messages) == told, version
    assert f"diffusers {newer[-1]} is newer than {major}.{minor}" in caplog.messages[-1]
