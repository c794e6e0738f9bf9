"""Two measurements are compared number by number, or refused."""

import copy
import json
from pathlib import Path

import pytest

from bench.compare import Incomparable, compare, number

MEASUREMENT = {
    "title": "t",
    "machine": "m",
    "seed": 0,
    "date": "d",
    "versions": {},
    "settings": {"size": 512, "json": "a.json"},
    "rows": [
        {"mode": "none", "s/step": "0.1", "waiting": "1.0%"},
        {"mode": "sync", "s/step": "0.4", "waiting": "0.0%"},
    ],
}


def changed(**parts):
    return {**copy.deepcopy(MEASUREMENT), **parts}


@pytest.mark.parametrize(
    ("cell", "value"), [("1.04x", 1.04), ("9.2%", 9.2), ("4.40 MiB", 4.4), ("-3", -3.0), ("5e-3 s", 0.005)]
)
def test_cells_with_units_are_numbers(cell, value):
    assert number(cell) == value


@pytest.mark.parametrize("cell", ["none", "", "2, 4", "2026-11-23", "of 24 steps", "256x256"])
def test_names_are_no_numbers(cell):
    assert number(cell) is None


def test_every_common_number_has_its_ratio():
    after = changed(rows=[{"mode": "none", "s/step": "0.2", "waiting": "2.0%"}, *MEASUREMENT["rows"][1:]])
    assert compare(MEASUREMENT, after) == [
        ("none", "s/step", "0.1", "0.2", "2.000x"),
        ("none", "waiting", "1.0%", "2.0%", "2.000x"),
        ("sync", "s/step", "0.4", "0.4", "1.000x"),
        ("sync", "waiting", "0.0%", "0.0%", "-"),
    ]


def test_sizes_and_numbers_before_a_name_are_part_of_it_and_what_is_missing_is_not():
    rows = [
        {"size": "256x256", "ranks": "1", "way": "alone", "faster": "1.00x", "waiting": "-"},
        {"size": "256x256", "ranks": "2", "way": "gang", "faster": "1.20x", "waiting": "0.1"},
        {"size": "512x512", "ranks": "2", "way": "gang", "faster": "1.50x", "waiting": "0.2"},
    ]
    after = copy.deepcopy(rows)[1:]
    after[0]["faster"] = "1.80x"
    lines = compare(changed(rows=rows[1:]), changed(rows=after[::-1]))
    assert lines[0] == ("256x256, 2, gang", "faster", "1.20x", "1.80x", "1.500x")
    assert compare(changed(rows=rows), changed(rows=after))[0][:3] == (
        "256x256, 1, alone",
        "only in",
        "before",
    )


def test_every_committed_measurement_compares_with_itself_row_by_row():
    for path in Path("docs/measurements").glob("*.json"):
        measurement = json.loads(path.read_text())
        if "title" in measurement:
            lines = compare(measurement, measurement)
            assert {line[4] for line in lines} <= {"1.000x", "-"}, path
            assert len({line[0] for line in lines}) >= len(measurement["rows"]) / 2, path


def test_rows_that_one_lacks_are_named():
    lines = compare(MEASUREMENT, changed(rows=MEASUREMENT["rows"][:1]))
    assert ("sync", "only in", "before", "", "") in lines


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        ({"title": "other"}, "title"),
        ({"machine": "other"}, "machine"),
        ({"settings": {"size": 256}}, "size"),
        ({"rows": []}, "no number"),
    ],
)
def test_what_measures_something_else_is_refused(parts, what):
    with pytest.raises(Incomparable, match=what):
        compare(MEASUREMENT, changed(**parts))


def test_where_it_was_written_makes_no_difference():
    assert compare(MEASUREMENT, changed(settings={"size": 512, "json": "b.json"}))


def test_what_no_bench_wrote_is_refused():
    with pytest.raises(Incomparable, match="no title"):
        compare({"command": "x", "rows": []}, MEASUREMENT)
