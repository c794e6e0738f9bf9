"""What measures GPUs runs on a CPU too, in a tiny size, so that a GPU's time is not lost to a slip."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import __main__ as stages
from bench.gpu import figure, serve, shares
from bench.gpu.shares import COLUMNS, share, whole_step
from bench.published import PUBLISHED, random_network
from distriray.config import MIXES, ExchangeMode
from distriray.parallel import engine_of


@pytest.mark.distributed  # it starts processes
def test_a_stage_runs_dry_and_its_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--dry", "--stage", "4", "--out", str(tmp_path)])
    stages.main()
    rows = json.loads((tmp_path / "shares.json").read_text())["rows"]
    assert {row["share of"] for row in rows} == {"diffusers", "a gang of 1", "a gang of 2"}
    assert set(rows[0]) == set(COLUMNS)

    bad = stages.Stage("bad", "timeit --bad", "timeit --bad")
    slow = stages.Stage("slow", "timeit", "timeit -n 1 -r 1 import(time);time.sleep(9)", limit_s=0.1)
    assert not stages.done(1, bad, tmp_path, dry=True)
    assert not stages.done(2, slow, tmp_path, dry=True)


@pytest.mark.distributed  # it starts processes
def test_a_stage_that_is_cut_off_leaves_no_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parent.py").write_text(
        "import pathlib, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "pathlib.Path('child').write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert not stages.done(1, stages.Stage("slow", "parent", "parent", limit_s=2.0), tmp_path, dry=True)
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    left = _runs(child)
    if left:
        os.kill(child, signal.SIGKILL)
    assert not left


def _runs(pid: int) -> bool:
    """Whether a process is there, and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.distributed  # it starts processes
def test_stages_of_tests_run_what_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_missing.py").write_text("import something_that_is_not_installed\n")
    (tmp_path / "test_there.py").write_text(
        "import pathlib, pytest\n@pytest.mark.gpu\ndef test_it(): pathlib.Path('ran').touch()\n"
    )
    monkeypatch.chdir(tmp_path)
    ((module, *options),) = {
        tuple(stage.arguments.split()[:-1]) for stage in stages.STAGES[: len(stages.TESTS)]
    }
    arguments = " ".join((module, *options, "."))
    assert not stages.done(1, stages.Stage("tests", arguments, arguments), tmp_path, dry=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(("name", "exchange"), [*product(PUBLISHED, ["sync"]), *product(["sdxl"], MIXES)])
def test_a_rank_of_each_published_network_has_its_share_timed(name: str, exchange: ExchangeMode) -> None:
    model, size = PUBLISHED[name], 128
    network = random_network(model.small, torch.device("cpu"), torch.float32)
    with torch.device("meta"):
        assert type(network) is type(model.make())
    assert whole_step(model, network, size, steps=1).step_ms > 0
    timing, buffers = share(model, network, 2, size, split=False, exchange=exchange, graphs=False, steps=1)
    assert timing.step_ms > 0 and buffers > 0


@pytest.mark.parametrize(("split", "rank"), [(True, 2), (False, 4)])
def test_the_share_of_a_rank_with_a_neighbour_on_each_side_is_timed_for_as_many_steps_as_asked(
    split: bool, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks: list[int] = []

    class Noted(shares.NotedPeers):
        def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
            super().__init__(rank, world_size, device)
            ranks.append(rank)

    monkeypatch.setattr(shares, "NotedPeers", Noted)
    model, cpu = PUBLISHED["sdxl"], torch.device("cpu")
    network = random_network(model.small, cpu, torch.float32)
    called = 0

    def count(*given: Any) -> None:
        nonlocal called
        called += 1

    monkeypatch.setattr(type(model), "call", count)
    share(model, network, 8, 256, split, "sync", graphs=False, steps=200)
    assert ranks == [rank] and called > 200


def test_steps_that_are_timed_are_short_where_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, waits = PUBLISHED["flux"], []

    def timed(step: Callable[[], Any], steps: int, device: torch.device) -> shares.Timing:
        taken = []
        for _ in range(steps):
            step()
            engine = engine_of(network)
            assert engine is not None
            taken.append(engine.statistics.waits)
        waits.append(taken)
        return shares.Timing(1.0, 1.0)

    monkeypatch.setattr(shares, "timed", timed)
    for short in (False, True):
        network = random_network(model.small, torch.device("cpu"), torch.float32)
        share(model, network, 2, 128, False, "sync", False, 4, short)
    whole, short_ones = waits
    assert len({*whole}) == len({*short_ones}) == 1 and 0 < short_ones[0] < whole[0]


def test_a_share_that_fails_keeps_no_other_from_being_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(model: Any, network: Any, ranks: int, *options: Any) -> tuple[shares.Timing, int]:
        if ranks == 1:
            raise RuntimeError("not launched as graphs: something")
        return shares.Timing(1.0, 1.0), 0

    monkeypatch.setattr(shares, "random_network", lambda *options: None)
    monkeypatch.setattr(shares, "whole_step", lambda *options: shares.Timing(1.0, 1.0))
    monkeypatch.setattr(shares, "share", measured)
    out = tmp_path / "shares.json"
    command = ["shares", "--device", "cpu", "--model", "flux", "--ranks", "1", "2", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(
        SystemExit, match="a gang of 1, together, -, kernel: not launched as graphs: something"
    ):
        shares.main()
    assert [row["share of"] for row in json.loads(out.read_text())["rows"]] == ["diffusers", "a gang of 2"]


def test_the_figure_takes_from_other_files_only_what_the_measurement_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(gang: str, step_ms: float) -> dict[str, str]:
        given = {"size": "1024x1024", "share of": gang, "guidance": "split", "launched by": "graph"}
        return {**given, "step, ms": str(step_ms)}

    for name, rows in (("shares-8", [("8", 1.0), ("4", 2.0)]), ("shares", [("4", 3.0)])):
        measured = {"rows": [row(f"a gang of {gang}", step_ms) for gang, step_ms in rows]}
        (tmp_path / f"{name}.json").write_text(json.dumps(measured))
    monkeypatch.setattr(figure, "FOLDER", tmp_path)
    assert figure.shares("shares", "1024x1024", "graph") == {"4": 3.0, "8": 1.0}


@pytest.mark.parametrize("device", sorted(serve.SCENES))
def test_the_service_of_the_last_stage_is_one(device: str) -> None:
    (pool,) = serve.config_of(device).pools
    assert (pool.name, pool.device, pool.workers) == (serve.POOL, device, serve.WORKERS)
