"""What measures GPUs runs on a CPU too, in a tiny size, so that a GPU's time is not lost to a slip."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import __main__ as stages
from bench.gpu import serve
from bench.gpu.shares import COLUMNS, share, whole_step
from bench.published import PUBLISHED, random_network


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


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_rank_of_each_published_network_has_its_share_timed(name: str) -> None:
    model, size = PUBLISHED[name], 128
    network = random_network(model.small, torch.device("cpu"), torch.float32)
    with torch.device("meta"):
        assert type(network) is type(model.make())
    assert whole_step(model, network, size, steps=1).step_ms > 0
    timing, buffers = share(model, network, 2, size, split=False, graphs=False, steps=1)
    assert timing.step_ms > 0 and buffers > 0


@pytest.mark.parametrize("device", sorted(serve.SCENES))
def test_the_service_of_the_last_stage_is_one(device: str) -> None:
    (pool,) = serve.config_of(device).pools
    assert (pool.name, pool.device, pool.workers) == (serve.POOL, device, serve.WORKERS)
