"""Numbers and files that a bench cannot work with are refused by its command line."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from bench import routing
from bench.arguments import add_json, measurement
from bench.report import Report
from bench.routing import decision_times


@pytest.mark.parametrize(
    ("bench", "arguments"),
    [
        ("bench.quality.__main__", "--minutes nan"),
        ("bench.quality.__main__", "--guidance 0"),
        ("bench.serving", "--loads 0.5 -1"),
        ("bench.serving", "--seconds inf"),
        ("bench.pages", "--seconds nan"),
        ("bench.pages", "--idle-seconds 0"),
        ("bench.simulator_truth", "--load nan"),
        ("bench.projection.__main__", "--warmup-steps -1"),
        ("bench.gpu.serve", "--deadline nan"),
        ("bench.projection.__main__", "--sizes 1000"),
        ("bench.gpu.shares", "--sizes 1000"),
        ("bench.exchange", "--size 132"),
        ("bench.exchange", "--ranks 1"),
        ("bench.exchange", "--backends nothing"),
        ("bench.attention", "--size 132"),
        ("bench.attention", "--ranks 2 1"),
        ("bench.attention", "--backends local"),
        ("bench.launches", "--sizes 1024 1000"),
        ("bench.launches", "--ranks 1"),
        ("bench.replay", "--size 1000"),
        ("bench.replay", "--ranks 1"),
        ("bench.quality.__main__", "--size 100"),
        ("bench.speed", "--sizes 250"),
        ("bench.state", "--sizes 250"),
        ("bench.predictions", "--requests 5"),
        ("bench.collective", "--backends nccl"),
        ("bench.collective", "--ranks 1"),
    ],
)
def test_a_number_that_nothing_can_be_measured_with_is_refused(
    bench: str, arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def parse_args(*given: Any) -> NoReturn:
        parse(*given)
        pytest.fail("it was taken")

    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [bench, *arguments.split()])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(bench).main()
    assert end.value.code == 2 and f"argument {arguments.split()[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"), [(None, "cannot be read"), ("x", "cannot be read"), ("[]", "no rows")]
)
def test_files_that_no_bench_wrote_are_refused(content: str | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(argparse.ArgumentTypeError, match=says):
        measurement(str(file))


@pytest.mark.parametrize(("place", "says"), [("file/x.json", "no folder"), ("folder", "cannot be written")])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    place: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    add_json(parser := argparse.ArgumentParser())
    with pytest.raises(SystemExit):
        parser.parse_args(["--json", str(tmp_path / place)])
    assert says in capsys.readouterr().err


def test_what_was_measured_is_written_with_what_the_command_was_told(tmp_path: Path) -> None:
    add_json(parser := argparse.ArgumentParser())
    told = parser.parse_args(["--json", str(tmp_path / "new" / "x.json")])
    report = Report("rows", ("what",), seed=0, settings=vars(told))
    report.add("a row")
    report.publish(told.json)
    written = measurement(str(told.json))
    assert written["rows"] == [{"what": "a row"}]
    here = subprocess.run(("git", "rev-parse", "HEAD"), capture_output=True, text=True).stdout
    commit = written["commit"]
    assert here.startswith(commit.removesuffix("-dirty")) if here else commit is None


def test_times_of_decisions_are_written_with_what_they_were_measured_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for table in ("decision_times", "against_optimum", "burst_bound"):
        monkeypatch.setattr(routing, table, lambda *given: {"requests": 1.0})
    assert routing.main(["--seed", "3", "--json", str(tmp_path / "x.json")]) == 0
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["seed"] == 3 and written["decision"] == 3 * [{"requests": 1.0}]
    assert written.keys() >= {"date", "commit", "machine", "versions", "settings"}


def test_no_quantile_of_decisions_is_above_the_longest() -> None:
    times = decision_times(2, 3, seed=1)
    assert times["p50 ms"] <= times["p99 ms"] <= times["max ms"]
