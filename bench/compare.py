"""Two measurements side by side, for a change under review: `python -m bench.compare BEFORE.json AFTER.json`.

Rows are matched by the columns up to the last one that holds names, so a row that only one of the two has is
named, not hidden.
Measurements of different benches, settings or machines are refused: their ratios would say nothing.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from typing import Any

from bench.arguments import measurement

NUMBER = re.compile(r"^[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?(?=$|[ %]|x(?!\d)|[a-wyzA-Z])")
MISSING = ("", "-")
NO_DIFFERENCE = {"json"}  # settings that change nothing of what is measured

Row = dict[str, str]
Key = tuple[tuple[str, ...], int]


class Incomparable(ValueError):
    """The two files do not measure the same thing."""


def number(cell: str) -> float | None:
    """The number that a cell starts with, such as 1.04 of `1.04x`; None if it is a name."""
    found = NUMBER.match(cell.strip())
    return float(found.group()) if found else None


def is_name(cell: str) -> bool:
    """Whether a cell says what was measured: it is there, and is no number."""
    return cell not in MISSING and number(cell) is None


def check_comparable(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raise Incomparable, saying what differs, unless both are of one bench, machine and setting."""
    for part in ("title", "machine", "seed", "settings"):
        if part not in before or part not in after:
            raise Incomparable(f"a file has no {part}; it was not written by a bench's --json")
    for part in ("title", "machine", "seed"):
        if before[part] != after[part]:
            raise Incomparable(f"the {part}s differ: {before[part]!r} and {after[part]!r}")
    names = (before["settings"].keys() | after["settings"].keys()) - NO_DIFFERENCE
    for name in sorted(names):
        values = [measurement["settings"].get(name) for measurement in (before, after)]
        if values[0] != values[1]:
            raise Incomparable(f"the setting {name} differs: {values[0]!r} and {values[1]!r}")


def keyed(rows: list[Row], labels: list[str]) -> dict[Key, Row]:
    """Rows by the cells of the columns `labels`; the n-th one with the same cells has n."""
    seen: Counter[tuple[str, ...]] = Counter()
    result = {}
    for row in rows:
        cells = tuple(row.get(label, "") for label in labels)
        result[cells, seen[cells]] = row
        seen[cells] += 1
    return result


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """One (row, column, before, after, after / before) for each number that both have.

    Raises:
        Incomparable: they measure different things, or have no number in common.
    """
    check_comparable(before, after)
    rows = before["rows"] + after["rows"]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    named = [i for i, column in enumerate(columns) if any(is_name(row.get(column, "")) for row in rows)]
    labels = columns[: named[-1] + 1 if named else 1]
    old, new = keyed(before["rows"], labels), keyed(after["rows"], labels)
    lines = []
    for key in dict.fromkeys([*old, *new]):
        name = ", ".join(cell for cell in key[0] if cell not in MISSING)
        if key not in old or key not in new:
            lines.append((name, "only in", *(("", "after") if key not in old else ("before", "")), ""))
            continue
        for column in columns:
            if column not in labels:
                a, b = (number(row.get(column, "")) for row in (old[key], new[key]))
                if a is not None and b is not None:
                    ratio = f"{b / a:.3f}x" if a else "-"
                    lines.append((name, column, old[key][column], new[key][column], ratio))
    if not any(line[4] for line in lines):
        raise Incomparable("they have no number in common")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=measurement)
    parser.add_argument("after", type=measurement)
    arguments = parser.parse_args()
    before, after = arguments.before, arguments.after
    try:
        lines = compare(before, after)
    except Incomparable as error:
        parser.error(str(error))
    print(before["title"])
    for side, found in (("before", before), ("after", after)):
        print(f"{side}: {found['date']}, {found['versions']}")
    table = [("row", "column", "before", "after", "after / before"), *lines]
    widths = [max(len(line[i]) for line in table) for i in range(5)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
