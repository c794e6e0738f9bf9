"""A host for scripts: the same verbs without asyncio, and a Ray of its own where none runs."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import ray

from distriray.cluster import deaf_to_sigterm, join, leave, own_sigterm
from distriray.errors import NotEnoughDevices
from distriray.events import Event
from distriray.gang import reaper
from distriray.gang.config import HostConfig
from distriray.gang.host import Host
from distriray.requests import GenerationRequest
from distriray.results import GenerationResult
from distriray.routing.policy import HostPolicy
from distriray.status import HostStatus

T = TypeVar("T")
OBJECT_STORE_BYTES = 256 * 2**20


class BlockingHost:
    """A host on an event loop in a thread of its own; every call may come from any thread."""

    def __init__(self, host: Host, loop: asyncio.AbstractEventLoop) -> None:
        self.host, self._loop = host, loop

    def generate(self, request: GenerationRequest) -> GenerationResult:
        """As `Host.generate`."""
        return self.do(self.host.generate(request))

    def stream(self, request: GenerationRequest) -> Iterator[Event]:
        """As `Host.stream`; leaving the loop over it cancels the request."""
        events = self.host.stream(request)
        try:
            while True:
                try:
                    yield self.do(anext(events))
                except StopAsyncIteration:
                    return
        finally:
            self.do(events.aclose())

    def cancel(self, request_id: str) -> bool:
        """As `Host.cancel`."""
        return self.do(self.host.cancel(request_id))

    def status(self) -> HostStatus:
        """As `Host.status`."""

        async def ask() -> HostStatus:
            return self.host.status()

        return self.do(ask())

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the host's event loop; an interrupt or a SIGTERM cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except (KeyboardInterrupt, SystemExit):
            future.cancel()
            raise


@contextmanager
def open_host(
    config: HostConfig,
    *,
    policy: HostPolicy | None = None,
    address: str | None = None,
    cpus: int | None = None,
) -> Iterator[BlockingHost]:
    """A host that ends with the block, together with everything it started.

    Args:
        address: of a running Ray cluster; without one a local Ray is started, unless this process has one.
        cpus: logical CPUs that a local Ray has; None is as many as the machine has cores.

    Raises:
        NotEnoughDevices, ModelNotFound, UnsupportedModel: the host cannot be started.
        ConnectionError: no Ray at `address`.
    """
    started = not ray.is_initialized()
    watcher = _start_ray(address, cpus) if started else None
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="distriray-host", daemon=True)
    thread.start()
    hosts: list[Host] = []  # the one that was started, even where an interrupt comes just then

    async def start() -> None:
        hosts.append(await Host.start(config, policy))

    async def close() -> None:
        for host in hosts:
            await host.close()

    try:
        try:
            starting = asyncio.run_coroutine_threadsafe(start(), loop)
            try:
                starting.result()
            except (KeyboardInterrupt, SystemExit):
                starting.cancel()
                raise
            yield BlockingHost(hosts[0], loop)
        finally:
            asyncio.run_coroutine_threadsafe(close(), loop).result()
    finally:
        asyncio.run_coroutine_threadsafe(_end_others(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        if started:
            leave()
        if watcher is not None:
            watcher.communicate()


async def _end_others() -> None:
    """Cancel every other task of this event loop, and return once they have given back what they had."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        if not task.cancelling():  # else it gives back what it has by now
            task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _start_ray(address: str | None, cpus: int | None) -> subprocess.Popen[str] | None:
    """Join the cluster at `address`, or start one here and return what watches it."""
    log = logging.getLogger("ray.serve.distriray")
    if log.level == logging.NOTSET:
        log.setLevel(logging.WARNING)  # Ray's own are errors only
    if address is not None:
        join(address)
        return None
    others = reaper.children()
    try:
        with deaf_to_sigterm():
            with own_sigterm():
                ray.init(
                    address="local",
                    num_cpus=cpus or len(os.sched_getaffinity(0)),
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                )
            watcher = reaper.start(others)
    except (OSError, ValueError) as error:
        raise NotEnoughDevices(f"Ray does not start on this machine: {error}") from error
    except BaseException:  # an interrupt, or the SIGTERM that has waited
        leave()
        raise
    return watcher
