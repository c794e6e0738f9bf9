"""A table with what it was measured on, for the terminal and as JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


class Report:
    """Rows of one measurement, with its date, commit, versions, machine and seed."""

    def __init__(self, title: str, columns: tuple[str, ...], *, seed: int, settings: dict[str, Any]) -> None:
        self.title = title
        self.columns = columns
        self.rows: list[tuple[str, ...]] = []
        self.context = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": _commit(),
            "seed": seed,
            "settings": settings,
            "machine": f"{_processor()}, {os.cpu_count()} cores",
            "versions": {
                name: _version(name)
                for name in ("torch", "diffusers", "transformers", "triton", "ray", "numpy")
            },
        }

    def add(self, *cells: str) -> None:
        assert len(cells) == len(self.columns)
        self.rows.append(cells)

    def print_last(self) -> None:
        """The row that was added last, unaligned, for whoever watches."""
        print(*self.rows[-1], sep="  ", flush=True)

    def publish(self, path: str | Path | None) -> None:
        """Print the table; write it to `path` too, if there is one."""
        self.print()
        if path is not None:
            self.write(path)

    def print(self) -> None:
        """The table, aligned, to standard output."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        print(self.title)
        print(f"{self.context['date']}, {self.context['machine']}, {self.context['versions']}")
        for row in (self.columns, *self.rows):
            cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            print("  ".join(cells))

    def write(self, path: str | Path) -> None:
        """The same as JSON, one object a row."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(
            json.dumps({"title": self.title, **self.context, "rows": rows}, indent=2, default=str) + "\n"
        )


def _commit() -> str | None:
    """Of what is measured, `-dirty` where files differ from it; None outside a clone."""
    described = ("git", "describe", "--always", "--dirty", "--exclude=*")
    try:
        found = subprocess.run(
            described, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
