"""Programs that ask through a handle: what they asked for ends with them."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from distriray.gang.background import Background

log = logging.getLogger("ray.serve.distriray")

LOOK_S = 2.0  # between two looks at who has died; there are none while no driver waits


class Callers:
    """The requests under way for drivers of Ray, which Serve does not cancel when a driver is killed.

    Args:
        cancel: stops a request by its id.
        dead: the ids of Ray jobs whose drivers are gone; blocks, and is called in a thread.
    """

    def __init__(self, cancel: Callable[[str], Awaitable[object]], dead: Callable[[], set[str]]) -> None:
        self._cancel, self._dead = cancel, dead
        self._requests: defaultdict[str, set[str]] = defaultdict(set)
        self._watching: asyncio.Task[None] | None = None
        self._background = Background(self._log)

    @contextmanager
    def waiting(self, driver: str | None, request_id: str) -> Iterator[None]:
        """While the block runs, the death of `driver` cancels the request; None is nobody in particular."""
        if driver is None:
            yield
            return
        self._requests[driver].add(request_id)
        if self._watching is None or self._watching.done():
            self._watching = self._background.spawn(self._watch())
        try:
            yield
        finally:
            self._requests[driver].discard(request_id)
            if not self._requests[driver]:
                del self._requests[driver]

    async def _watch(self) -> None:
        while self._requests:
            await asyncio.sleep(LOOK_S)
            try:
                await self._look()
            except Exception as error:
                self._log(error)

    async def _look(self) -> None:
        dead = await asyncio.to_thread(self._dead)
        for driver in dead & self._requests.keys():
            for request_id in list(self._requests.get(driver, ())):
                log.info("request %s is cancelled: its caller, job %s, has died", request_id, driver)
                await self._cancel(request_id)

    def _log(self, error: Exception) -> None:
        log.error("it is not known which callers have died", exc_info=error)


def dead_drivers() -> set[str]:
    """The ids of Ray jobs whose drivers have ended, by the cluster's own book."""
    from ray._private.state import jobs

    return {job["JobID"] for job in jobs() if job["IsDead"]}
