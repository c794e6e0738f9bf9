"""Numbers and files that a bench cannot work with are refused by its command line."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from bench.arguments import add_json, at_least, measurement
from bench.report import Report
from bench.routing import decision_times


@pytest.mark.parametrize(("text", "says"), [("2", "2 is too few; use 3 or more"), ("x", "'x' is no integer")])
def test_numbers_that_are_too_few_are_refused(text: str, says: str) -> None:
    assert at_least(3)("3") == 3
    with pytest.raises(argparse.ArgumentTypeError, match=says):
        at_least(3)(text)


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
    assert measurement(str(told.json))["rows"] == [{"what": "a row"}]


def test_no_quantile_of_decisions_is_above_the_longest() -> None:
    times = decision_times(2, 3, seed=1)
    assert times["p50 ms"] <= times["p99 ms"] <= times["max ms"]
