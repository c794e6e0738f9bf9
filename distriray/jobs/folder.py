"""A job's output folder, kept so that the job can be killed at any moment and go on."""

from __future__ import annotations

import fcntl
import json
import os
import re
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from distriray.errors import InvalidRequest
from distriray.jobs.prompts import BadLine, Prompt, plain
from distriray.results import GenerationResult

UNFINISHED_IMAGE = re.compile(r"\.[0-9a-f]{16}(-[0-9]+)?_[0-9]+\.png\.part")
"""The name of an image that is being written: that of the image, with its prompt's id, between two marks."""


TOLD = ("model", "height", "width", "gang_size", "exchange", "timings", "warnings")
"""What a line of the manifest has of the summary of a result."""


class Folder:
    """`images/`, `manifest.jsonl` with a line for each image, `errors.jsonl` and `summary.json`.

    An image gets its name only when all of it is on disk, and its manifest line after that; a prompt is made
    when the manifest has a line for each of its images and the images are there. Methods may be called from
    any thread. A context manager; one process at a time can have a folder open.

    Raises:
        InvalidRequest: another process has it open, or it cannot be made or written to; from every method, as
            disks fill up.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images = path / "images"
        self.manifest = path / "manifest.jsonl"
        self.errors = path / "errors.jsonl"
        self.summary = path / "summary.json"
        self._writing = threading.Lock()

    def __enter__(self) -> Self:
        with self._written():
            self.images.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a")
        try:
            with self._written():
                self._take_lock()
                self._clear_away_unfinished()
                self.made = self._tidy_manifest()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    @contextmanager
    def _written(self) -> Iterator[None]:
        """What the system says of a file here, said of the folder."""
        try:
            yield
        except OSError as error:
            why = error.strerror or str(error)
            raise InvalidRequest(
                f"{self.path} cannot be written to: {why}; use another --out, or mend that: the same command "
                "then makes what is missing"
            ) from error

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidRequest(
                f"another job is writing to {self.path}; wait for it or use another --out"
            ) from None

    def _clear_away_unfinished(self) -> None:
        """Remove what a job that was killed had begun here, by its exact name: all else is somebody's."""
        own = [_part_of(path) for path in (self.manifest, self.errors, self.summary)]
        images = [path for path in self.images.iterdir() if UNFINISHED_IMAGE.fullmatch(path.name)]
        for path in own + images:
            if path.is_file():
                path.unlink()

    def _tidy_manifest(self) -> set[str]:
        """The prompts that were made; what the manifest has of prompts that were not is taken out of it.

        JSON that is no entry of a job's is somebody else's, and stays.
        """
        lines: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        foreign = b""
        before = self.manifest.read_bytes() if self.manifest.exists() else b""
        for text in before.splitlines():
            try:
                entry = json.loads(text)
            except (ValueError, RecursionError):  # the line that was being written when the job was killed
                continue
            if _is_entry(entry):
                lines[entry["prompt_id"]][entry["index"]] = entry
            else:
                foreign += text + b"\n"
        whole = {
            prompt: entries
            for prompt, entries in lines.items()
            if all(len(entries) == e["of"] and (self.path / e["file"]).is_file() for e in entries.values())
        }
        after = foreign + b"".join(_line(entry) for entries in whole.values() for entry in entries.values())
        if after != before:
            _replace(self.manifest, after)
        return set(whole)

    def keep(self, prompt: Prompt, result: GenerationResult) -> None:
        """Write the images of a prompt, then their manifest lines."""
        facts = result.summary()
        seeds = facts.pop("seeds")
        lines = b""
        for index, (image, seed) in enumerate(zip(result.images, seeds, strict=True)):
            path = self.images / f"{prompt.id}_{index}.png"
            with self._written():
                part = _part_of(path)
                with part.open("wb") as file:
                    image.save(file, format="PNG")
                    _flush(file)
                part.replace(path)
            lines += _line(
                {
                    "prompt_id": prompt.id,
                    "line": prompt.line,
                    "index": index,
                    "of": len(seeds),
                    "file": str(path.relative_to(self.path)),
                    "seed": seed,
                    **{name: facts[name] for name in TOLD},
                }
            )
        self._append(self.manifest, lines)
        with self._writing:
            self.made.add(prompt.id)

    def begin(self, good: Iterable[Prompt], bad: Iterable[BadLine]) -> None:
        """Begin a run: the manifest says on which lines of the file its prompts are now, None of the others.

        The list of what goes wrong begins with the lines that cannot be made. How the run before ended is no
        longer said.
        """
        errors = b"".join(_line(_error(b.line, b.message, b.param)) for b in bad)
        now = {prompt.id: prompt.line for prompt in good}
        with self._written():
            self.summary.unlink(missing_ok=True)
            _replace(self.errors, errors)
            before = self.manifest.read_bytes() if self.manifest.exists() else b""
            after = b"".join(_on_line(text, now) for text in before.splitlines())
            if after != before:
                _replace(self.manifest, after)

    def fail(self, prompt: Prompt, error: Exception) -> None:
        """Note that a prompt was not made; the next run tries it again."""
        param = error.param if isinstance(error, InvalidRequest) else None
        self._append(
            self.errors, _line(_error(prompt.line, f"{type(error).__name__}: {plain(error)}", param))
        )

    def write_summary(self, facts: Mapping[str, Any]) -> None:
        """Write how this run ended."""
        with self._written():
            _replace(self.summary, (json.dumps(facts, indent=2) + "\n").encode())

    def _append(self, path: Path, lines: bytes) -> None:
        with self._writing, self._written(), path.open("ab") as file:
            file.write(lines)
            _flush(file)


def _is_entry(entry: Any) -> bool:
    """Whether a line of a manifest is one that a job wrote."""
    kinds = {"prompt_id": str, "index": int, "of": int, "file": str}
    return isinstance(entry, dict) and all(type(entry.get(name)) is kind for name, kind in kinds.items())


def _on_line(text: bytes, lines: Mapping[str, int]) -> bytes:
    """A line of a manifest, with the line of the file that its prompt is on by now."""
    entry = json.loads(text)
    return _line({**entry, "line": lines.get(entry["prompt_id"])}) if _is_entry(entry) else text + b"\n"


def _part_of(path: Path) -> Path:
    """The name of a file until all of it is on disk."""
    return path.with_name(f".{path.name}.part")


def _error(line: int, message: str, param: str | None) -> dict[str, Any]:
    return {"line": line, "error": message, "param": param}


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _replace(path: Path, content: bytes) -> None:
    part = _part_of(path)
    with part.open("wb") as file:
        file.write(content)
        _flush(file)
    part.replace(path)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
