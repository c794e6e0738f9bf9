"""The examples run as they are printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.distributed.ranks import free_address
from tests.models import tiny_flux, tiny_sdxl

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


@pytest.mark.parametrize("model", [tiny_sdxl, tiny_flux])
def test_torchrun_makes_a_picture_with_two_processes(model: Callable[[], Any], tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", free_address().split(":")[1], "examples/torchrun.py", "a lake at dusk"]
    command += ["--model", str(tmp_path / "model"), "--address", free_address()]
    command += ["--height", "96", "--width", "64", "--steps", "6", "--out", str(tmp_path / "lake.png")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2 ranks" in done.stdout
    assert Image.open(tmp_path / "lake.png").size == (64, 96)


def test_a_folder_without_a_pipeline_is_refused_by_name(tmp_path: Path) -> None:
    command = [sys.executable, "examples/torchrun.py", "a lake at dusk", "--model", str(tmp_path)]
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"no diffusers pipeline was saved to {tmp_path}" in done.stderr
