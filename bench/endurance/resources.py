"""Memory, threads and open files of the service's processes over time."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from bench.report import Report

ROLES = {
    "ProxyActor": "proxy",
    "ServeController": "controller",
    ":Ingress": "router",
    "ServeReplica": "host",
    "ray::Worker": "worker",
    "/raylet/raylet": "raylet",
    "gcs_server": "gcs",
}
"""Whose process it is, by the first that its command line has."""
SETTLED_S = 120.0
"""A process' first seconds, in which it loads and meets each request for the first time, are no growth."""
SHARED = Path("/dev/shm")
COLUMNS = (
    "the oldest",
    "of",
    "minutes",
    "MB",
    "MB half-way",
    "MB at last",
    "MB/h since half-way",
    "files",
    "threads",
)


class Look(NamedTuple):
    """What a process holds at one moment; `memory` is what it shares with nobody, in MB."""

    at: float
    memory: float
    files: int
    threads: int


@dataclass
class Life:
    """One process over time."""

    began: float
    role: str = ""
    looks: list[Look] = field(default_factory=list)

    @property
    def settled(self) -> list[Look]:
        return [look for look in self.looks if look.at - self.began > SETTLED_S]

    def figures(self) -> tuple[str, ...]:
        """Its cells under `COLUMNS` but for the first two; growth if it was seen for long."""
        looks = self.settled
        if len(looks) <= 5:
            last = self.looks[-1]
            return "", "", "", f"{last.memory:.0f}", "", str(last.files), str(last.threads)
        late = looks[len(looks) // 2 :]
        growth = np.polyfit([look.at / 3600 for look in late], [look.memory for look in late], 1)[0]
        last = looks[-1]
        return (
            f"{(last.at - looks[0].at) / 60:.0f}",
            *(f"{look.memory:.0f}" for look in (looks[0], late[0], last)),
            f"{growth:+.0f}",
            str(last.files),
            str(last.threads),
        )


class Resources:
    """All processes that this one started, and itself."""

    def __init__(self) -> None:
        self._lives: dict[tuple[int, float], Life] = {}
        self._shared = [_shared_files()]

    async def look_on(self, every_s: float) -> None:
        """Look until this is cancelled."""
        while True:
            self.look()
            await asyncio.sleep(every_s)

    def look(self) -> None:
        """Note what every process holds now."""
        now = time.time()
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            with suppress(psutil.Error, OSError):  # it may end meanwhile
                key = process.pid, process.create_time()
                life = self._lives.setdefault(key, Life(process.create_time()))
                life.role = role_of(process)  # Ray starts processes before it knows what for
                memory = process.memory_full_info().uss / 1e6
                life.looks.append(Look(now, memory, process.num_fds(), process.num_threads()))
        self._shared.append(_shared_files())

    def tell(self, report: Report) -> None:
        """Add, for each role, how many processes there were, and the life of the oldest."""
        seen = [life for life in self._lives.values() if life.looks]
        for role in sorted({life.role for life in seen}):
            lives = [life for life in seen if life.role == role]
            oldest = max(lives, key=lambda life: life.looks[-1].at - life.began)
            report.add(role, str(len(lives)), *oldest.figures())
        print(f"files in {SHARED}: {self._shared[0]} at first, {self._shared[-1]} at last")


def role_of(process: psutil.Process) -> str:
    """Whose process it is."""
    if process.pid == os.getpid():
        return "clients"
    title = " ".join(process.cmdline())
    return next((role for part, role in ROLES.items() if part in title), "others of Ray")


def _shared_files() -> int:
    return sum(1 for _ in SHARED.iterdir())
