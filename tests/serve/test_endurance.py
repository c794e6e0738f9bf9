"""The service endures a minute of load and strikes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_nothing_is_lost_and_no_picture_is_another_one(tmp_path: Path) -> None:
    small = {"minutes": 1, "clients": 3, "hosts": 2, "workers": 2, "routers": 2, "every": 8, "look": 2}
    options = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "bench.endurance", *options, "--json", str(tmp_path / "endurance.json")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-5000:]
    rows = {row["what"]: row for row in json.loads((tmp_path / "endurance.json").read_text())["rows"]}
    assert int(rows["finished"]["count"]) > 10 and any(what.startswith("struck") for what in rows)
    assert rows["lost, or another picture"]["count"] == "0"
