"""The service that is to endure: one pool of hosts on the built-in model."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from bench.adapters import write_adapter
from bench.endurance.scenes import ADAPTERS, MODEL
from distriray import AsyncClient
from distriray.errors import DistrirayError
from distriray.models import ModelSpec, load_pipeline

POOL = "elastic"
APPLICATION = "distriray"
SILENCE_S = 10.0
START_S = WHOLE_S = 300.0
"""Seconds that the service has to start, and to be whole again."""


class Service:
    """A service on this machine's Serve, described and deployed as `serve deploy` does it.

    Args:
        url: of Serve.
        hosts, workers, routers: how many it is to have, `workers` of each host.
        adapters: an empty folder.
    """

    def __init__(self, url: str, hosts: int, workers: int, routers: int, adapters: Path) -> None:
        self.url = url
        self._hosts, self._workers, self._routers = hosts, workers, routers
        self._adapters = adapters
        self._reconfigured = self._redeployed = 0
        unet = load_pipeline(ModelSpec(name=MODEL), "cpu").unet
        for seed, name in enumerate(ADAPTERS):
            write_adapter(adapters / f"{name}.safetensors", unet, seed)

    async def start(self, client: AsyncClient) -> None:
        """Deploy it, and wait until it is whole."""
        self._deploy()
        end = time.monotonic() + START_S
        while serve.status().applications[APPLICATION].status != "RUNNING":
            if time.monotonic() > end:
                raise TimeoutError(f"the service is not up within {START_S:g} s: {serve.status()}")
            await asyncio.sleep(1)
        if not await self.whole(client):
            raise TimeoutError("the service is up, and not whole")

    def reconfigure(self) -> None:
        """Change a field that hosts take while they work."""
        self._reconfigured += 1
        self._deploy()

    def redeploy(self) -> None:
        """Change one that they do not: every host and router is replaced."""
        self._redeployed += 1
        self._deploy()

    def _deploy(self) -> None:
        pool = {
            "name": POOL,
            "model": MODEL,
            "device": "cpu",
            "workers": self._workers,
            "cpus_per_worker": 0.1,
            "min_hosts": self._hosts,
            "max_hosts": self._hosts,
            "parallel": {"exchange": "sync"},
            "lora_dir": str(self._adapters),
            "lora_cache_bytes": 4 * 2**20,  # two adapters, of three
            "timeout_s": 5.0,
            "silence_s": SILENCE_S + self._redeployed / 1000,
            "stall_s": 60.0,
        }
        router = {"min_replicas": self._routers, "max_replicas": self._routers, "cpus": 0.1}
        application: dict[str, Any] = {
            "name": APPLICATION,
            "route_prefix": "/",
            "import_path": "deployments.app:build_app",
            "args": {"pools": [pool], "router": router},
            "deployments": [{"name": POOL, "user_config": {"max_queue": 64 - self._reconfigured % 2}}],
        }
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))

    async def whole(self, client: AsyncClient) -> bool:
        """Wait until every host is there, its workers are free, and nobody waits; whether that came."""
        end = time.monotonic() + WHOLE_S
        while time.monotonic() < end:
            with suppress(ConnectionError, DistrirayError):
                hosts = (await client.fleet()).pools[POOL].hosts.values()
                if len(hosts) == self._hosts and all(
                    host.free_workers == self._workers and not host.running and not host.waiting
                    for host in hosts
                ):
                    return True
            await asyncio.sleep(0.25)
        return False
