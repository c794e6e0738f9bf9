"""The host's part of a captured step is measured where there is no GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

from bench import launches, replay


def test_each_way_to_exchange_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "replay.json"
    command = ["bench.replay", "--models", "z-image", "--ranks", "2", "--steps", "1", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    replay.main()
    rows = json.loads(path.read_text())["rows"]
    assert [row["exchange"] for row in rows] == ["none", "displaced", "compressed", "sync", "sync"]
    graphs = {row["exchange"] + row["attention"]: int(row["graphs"]) for row in rows}
    # Of 32 layers that attend, and a gather: one exchange each, or two where heads are dealt.
    assert graphs["nonegather"] == 2 and graphs["syncgather"] == 34 and graphs["synculysses"] == 66


@pytest.mark.parametrize(
    ("bench", "arguments"),
    [(replay, "--models qwen-image --size 128 --steps 1"), (launches, "--model sdxl --sizes 128")],
)
def test_an_odd_gang_is_measured_without_halves(
    bench: ModuleType, arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "odd.json"
    monkeypatch.setattr(
        sys, "argv", [bench.__name__, *arguments.split(), "--ranks", "3", "--json", str(path)]
    )
    monkeypatch.setattr(bench, "ways", lambda model, patches: [("sync", "gather")])
    bench.main()
    rows = json.loads(path.read_text())["rows"]
    assert {row["guidance"] for row in rows} == {"together"}
