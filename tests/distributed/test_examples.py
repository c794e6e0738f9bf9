"""The examples run as they are printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.distributed.ranks import free_address
from tests.models import tiny_sdxl

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]


def test_the_engines_page_launches_a_gang_as_printed(tmp_path: Path) -> None:
    page = (ROOT / "docs/engine.md").read_text()
    [program] = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "launch(2" in block]
    (tmp_path / "draw.py").write_text(program)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "draw.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "lake.png").size == (256, 256)


def test_torchrun_makes_a_picture_with_two_processes(tmp_path: Path) -> None:
    tiny_sdxl().save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", free_address().split(":")[1], "examples/torchrun.py", "a lake at dusk"]
    command += ["--model", str(tmp_path / "model"), "--address", free_address()]
    command += ["--height", "96", "--width", "64", "--steps", "6", "--out", str(tmp_path / "lake.png")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2 ranks" in done.stdout
    assert Image.open(tmp_path / "lake.png").size == (64, 96)
