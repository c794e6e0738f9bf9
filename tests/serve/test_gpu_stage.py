"""The last stage of `make gpu`, on the service that is there: all of it but its start."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from bench.gpu import serve as stage
from bench.report import Report
from distriray import Client
from distriray.handle import HandleClient

from .conftest import HTTP

pytestmark = pytest.mark.ray


def test_a_gang_is_watched_and_one_of_its_workers_killed(
    client: HandleClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slip would be found on a GPU otherwise, after all other stages."""
    monkeypatch.setitem(stage.SCENES, "cpu", (128, 100))  # steps of a tiny model are soon over
    report = Report("the stage", ("what", "figure"), seed=stage.SEED, settings={})
    options = argparse.Namespace(device="cpu", out=tmp_path / "serve.json")
    with Client(HTTP, timeout_s=120) as over_http:
        stage.watch_a_gang(over_http, report, options)
    told = dict(report.rows)
    assert told["gangs that broke under it"] == "1"
    assert len(list(tmp_path.glob("serve-*.png"))) == 4
