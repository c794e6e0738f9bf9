"""What strikes the service while it works: processes are killed and stopped, and it is described anew."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from ray._private.state import actors

from bench.endurance.clients import NO_SECONDS
from bench.endurance.service import APPLICATION, POOL, Service
from bench.report import Report
from distriray import AsyncClient
from distriray.errors import DistrirayError

STOPPED_S = (0.5, 12.0)
"""Shorter and longer than after what a worker counts as hung."""


class Strikes:
    """What strikes a service.

    Args:
        service: the one that is struck, and `client` one of its clients.
        draw: chooses what strikes whom, and when.
    """

    def __init__(self, service: Service, client: AsyncClient, draw: random.Random) -> None:
        self._service = service
        self._client = client
        self._draw = draw
        self._struck: Counter[str] = Counter()

    async def strike_on(self, kinds: Sequence[str], every_s: float) -> None:
        """Strike at random times, until this is cancelled."""
        while kinds:
            await asyncio.sleep(self._draw.expovariate(1 / every_s))
            (kind,) = self._draw.choices(kinds, [0.2 if kind == "redeploy" else 1.0 for kind in kinds])
            if await STRIKES[kind](self):
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

    async def reconfigure(self) -> bool:
        return await self._describe(self._service.reconfigure, "reconfigure the hosts")

    async def redeploy(self) -> bool:
        return await self._describe(self._service.redeploy, "replace all hosts and routers")

    async def _describe(self, change: Callable[[], None], what: str) -> bool:
        _say(what)
        await asyncio.to_thread(change)
        return True

    async def _worker(self) -> int | None:
        with suppress(ConnectionError, DistrirayError):
            hosts = (await self._client.fleet()).pools[POOL].hosts.values()
            if pids := [worker.pid for host in hosts for worker in host.workers if worker.healthy]:
                return self._draw.choice(pids)
        return None

    def _replica(self, deployment: str) -> int | None:
        """The process of any replica of a deployment."""
        alive = actors(actor_state_name="ALIVE").values()
        name = f"SERVE_REPLICA::{APPLICATION}#{deployment}#"
        pids = [actor["Pid"] for actor in alive if actor["Name"].startswith(name)]
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
            _say(f"{what}, process {pid}")
        return True

    def tell(self, report: Report) -> None:
        """Add how often what struck."""
        for kind, count in sorted(self._struck.items()):
            report.add(f"struck: {kind}", str(count), *NO_SECONDS)


def _say(what: str) -> None:
    print(time.strftime("%H:%M:%S"), what, flush=True)


STRIKES: dict[str, Callable[[Strikes], Awaitable[bool]]] = {
    "kill-worker": Strikes.kill_worker,
    "stop-worker": Strikes.stop_worker,
    "kill-host": Strikes.kill_host,
    "stop-host": Strikes.stop_host,
    "kill-router": Strikes.kill_router,
    "stop-router": Strikes.stop_router,
    "reconfigure": Strikes.reconfigure,
    "redeploy": Strikes.redeploy,
}
