"""Processes that are killed or stopped while the service works."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import psutil

from bench.endurance.scenes import POOL
from bench.report import Report
from distriray import AsyncClient
from distriray.errors import DistrirayError

STOPPED_S = (0.5, 12.0)
"""Shorter and longer than after what a worker counts as hung."""


class Deaths:
    """What strikes the service.

    Args:
        client: of the service.
        draw: chooses victims and times.
    """

    def __init__(self, client: AsyncClient, draw: random.Random) -> None:
        self._client = client
        self._draw = draw
        self._struck: Counter[str] = Counter()

    async def strike_on(self, kinds: Sequence[str], every_s: float) -> None:
        """Strike at random times, until this is cancelled."""
        while kinds:
            await asyncio.sleep(self._draw.expovariate(1 / every_s))
            kind = self._draw.choice(kinds)
            if await DEATHS[kind](self):
                self._struck[kind] += 1

    async def kill_worker(self) -> bool:
        return self._send(signal.SIGKILL, await self._worker(), "kill a worker")

    async def stop_worker(self) -> bool:
        return await self._stop(await self._worker(), "stop a worker")

    async def kill_host(self) -> bool:
        return self._send(signal.SIGKILL, self._replica(POOL), "kill a host")

    async def stop_host(self) -> bool:
        return await self._stop(self._replica(POOL), "stop a host")

    async def kill_router(self) -> bool:
        return self._send(signal.SIGKILL, self._replica("Ingress"), "kill a router")

    async def stop_router(self) -> bool:
        return await self._stop(self._replica("Ingress"), "stop a router")

    async def _worker(self) -> int | None:
        with suppress(ConnectionError, DistrirayError):
            hosts = (await self._client.fleet()).pools[POOL].hosts.values()
            if pids := [worker.pid for host in hosts for worker in host.workers if worker.healthy]:
                return self._draw.choice(pids)
        return None

    def _replica(self, deployment: str) -> int | None:
        pids = []
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if f"ServeReplica:distriray:{deployment}" in " ".join(process.cmdline()):
                    pids.append(process.pid)
        return self._draw.choice(pids) if pids else None

    async def _stop(self, pid: int | None, what: str) -> bool:
        stopped = self._send(signal.SIGSTOP, pid, what)
        try:
            if stopped:
                await asyncio.sleep(self._draw.uniform(*STOPPED_S))
        finally:
            self._send(signal.SIGCONT, pid)
        return stopped

    @staticmethod
    def _send(number: int, pid: int | None, what: str = "") -> bool:
        """Whether there was such a process; says so where `what` does."""
        if pid is None:
            return False
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        if what:
            print(f"{time.strftime('%H:%M:%S')} {what}: process {pid}", flush=True)
        return True

    def tell(self, report: Report) -> None:
        """Add how often what struck."""
        for kind, count in sorted(self._struck.items()):
            report.add(f"struck: {kind}", str(count), "")


DEATHS: dict[str, Callable[[Deaths], Awaitable[bool]]] = {
    "kill-worker": Deaths.kill_worker,
    "stop-worker": Deaths.stop_worker,
    "kill-host": Deaths.kill_host,
    "stop-host": Deaths.stop_host,
    "kill-router": Deaths.kill_router,
    "stop-router": Deaths.stop_router,
}
