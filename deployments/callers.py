"""Programs that ask through a handle, and routers that ask hosts: what they asked for ends with them."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager

import ray

from distriray.gang.background import Background

log = logging.getLogger("ray.serve.distriray")

LOOK_S = 2.0  # between two looks at who has died; there are none while nobody waits


class Callers:
    """The requests under way for processes of Ray, which Serve does not cancel when a caller is killed.

    Args:
        cancel: stops a request by its id.
        dead: those of these callers that are gone, and maybe others; blocks, and is called in a thread.
    """

    def __init__(
        self, cancel: Callable[[str], Awaitable[object]], dead: Callable[[Collection[str]], set[str]]
    ) -> None:
        self._cancel, self._dead = cancel, dead
        self._requests: defaultdict[str, list[str]] = defaultdict(list)  # one may be there twice, and refused
        self._watching: asyncio.Task[None] | None = None
        self._background = Background(self._log)

    @contextmanager
    def waiting(self, caller: str | None, request_id: str) -> Iterator[None]:
        """While the block runs, the death of `caller` cancels the request; None is nobody in particular."""
        if caller is None:
            yield
            return
        self._requests[caller].append(request_id)
        if self._watching is None or self._watching.done():
            self._watching = self._background.spawn(self._watch())
        try:
            yield
        finally:
            self._requests[caller].remove(request_id)
            if not self._requests[caller]:
                del self._requests[caller]

    async def _watch(self) -> None:
        while self._requests:
            await asyncio.sleep(LOOK_S)
            try:
                await self._look()
            except Exception as error:
                self._log(error)

    async def _look(self) -> None:
        dead = await asyncio.to_thread(self._dead, tuple(self._requests))
        for caller in dead & self._requests.keys():
            for request_id in set(self._requests.get(caller, ())):
                log.info("request %s is cancelled: its caller, %s, has died", request_id, caller)
                await self._cancel(request_id)

    def _log(self, error: Exception) -> None:
        log.error("it is not known which callers have died", exc_info=error)


def dead_drivers(_: Collection[str]) -> set[str]:
    """The ids of Ray jobs whose drivers have ended, by the cluster's own book."""
    from ray._private.state import jobs

    return {job["JobID"] for job in jobs() if job["IsDead"]}


def dead_actors(actors: Collection[str]) -> set[str]:
    """Those of these actors, by their ids, that have ended, by the same book."""
    from ray._private.state import actors as look_up

    return {actor for actor in actors if look_up(actor).get("State") == "DEAD"}


def this_actor() -> str | None:
    """The id of the actor that this runs in; None elsewhere."""
    return ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None
