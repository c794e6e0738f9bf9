"""A host's workers: started, linked into gangs, watched, and replaced in place when they die."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from torch.distributed import TCPStore

from ..errors import DistrirayError, GangBroken
from ..routing.buddy import aligned_blocks
from .config import HostConfig
from .messages import Link, WorkerFacts
from .placement import Placement
from .worker import Worker

REPAIR_ATTEMPTS = 3
HEARTBEAT_S = 5.0

Group = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Repair:
    """A worker that died and was replaced; `seconds` from its death to its place in every gang."""

    worker: int
    cause: str
    seconds: float


class Crew:
    """The workers of one host, by index. All methods belong to one event loop.

    Attributes:
        links: the communicator's name of every group that is ready to be lent.
        healthy: workers that are loaded and linked.
        failure: why the crew cannot be repaired, or None.
    """

    def __init__(
        self,
        config: HostConfig,
        placement: Placement,
        on_lost: Callable[[int], None],
        on_ready: Callable[[int], None],
    ) -> None:
        self.config, self.placement = config, placement
        self.handles: dict[int, Any] = {}
        self.facts: dict[int, WorkerFacts] = {}
        self.memory: dict[int, int] = {}
        self.links: dict[Group, str] = {}
        self.healthy: set[int] = set()
        self.repairs: list[Repair] = []
        self.failure: str | None = None
        self._groups = aligned_blocks(config.workers, config.sizes)
        self._on_lost, self._on_ready = on_lost, on_ready
        self._generations = itertools.count()
        self._linking = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._address = ray.util.get_node_ip_address()
        self._store = TCPStore(self._address, 0, is_master=True, wait_for_workers=False)

    async def start(self) -> None:
        """Start and load all workers, and form every gang once.

        Raises:
            ModelNotFound, UnsupportedModel, GangBroken: as the workers do.
        """
        indices = range(self.config.workers)
        await _together(self._bring_up(index) for index in indices)
        await self._link()
        for index in indices:
            self._attend(index)
            self.healthy.add(index)

    def lose(self, index: int, cause: str) -> None:
        """Worker `index` is dead or is to be given up: replace it in the background. Idempotent."""
        if index not in self.handles or self._closing:
            return
        ray.kill(self.handles.pop(index))
        self.healthy.discard(index)
        self.links = {group: name for group, name in self.links.items() if index not in group}
        self._on_lost(index)
        self._spawn(self._replace(index, cause, time.monotonic()))

    def relink(self, group: Group) -> None:
        """The communicator of `group` broke while its members live: they are out until it is made anew."""
        self.links.pop(group, None)
        out = [index for index in group if index in self.healthy]
        for index in out:
            self.healthy.discard(index)
            self._on_lost(index)
        self._spawn(self._return({index: self.handles[index] for index in out}))

    async def close(self) -> None:
        """End every worker. Idempotent."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for handle in self.handles.values():
            ray.kill(handle)
        self.handles.clear()
        self.healthy.clear()

    async def _bring_up(self, index: int) -> None:
        """Start worker `index` and load its weights; only then is it among `handles`."""
        actor = ray.remote(Worker).options(name=None, **self.placement.options(index))
        handle = actor.remote(
            self.config.model,
            self.placement.device,
            (self._address, self._store.port),
            self.config.timeout_s,
        )
        try:
            facts = await asyncio.wait_for(result_of(handle.load.remote()), self.config.start_timeout_s)
        except BaseException:
            ray.kill(handle)
            raise
        self.handles[index], self.facts[index], self.memory[index] = handle, facts, facts.memory

    async def _link(self) -> None:
        """Form every group that is not formed and whose members all live."""
        async with self._linking:
            members = dict(self.handles)
            missing = [g for g in self._groups if g not in self.links and members.keys() >= set(g)]
            names = {g: f"{'-'.join(map(str, g))}.{next(self._generations)}" for g in missing if len(g) > 1}
            plans = {
                index: [Link(g, name, g.index(index), len(g)) for g, name in names.items() if index in g]
                for index in members
            }
            await _together(
                result_of(members[index].link.remote(links)) for index, links in plans.items() if links
            )
            for group in missing:
                if all(self.handles.get(index) is members[index] for index in group):
                    self.links[group] = names.get(group, "alone")

    async def _replace(self, index: int, cause: str, died: float) -> None:
        for attempt in range(REPAIR_ATTEMPTS):
            try:
                if index not in self.handles:
                    await self._bring_up(index)
                await self._link()
            except (RayError, GangBroken, DistrirayError, OSError) as error:
                cause = f"{cause}; attempt {attempt + 1}: {error}"
                if isinstance(error, RayActorError) and index in self.handles:
                    ray.kill(self.handles.pop(index))
                continue
            self._attend(index)
            self.repairs.append(Repair(index, cause, time.monotonic() - died))
            self._welcome(index)
            return
        self.failure = f"worker {index} could not be replaced: {cause}"

    async def _return(self, members: dict[int, Any]) -> None:
        for _ in range(REPAIR_ATTEMPTS):
            try:
                await self._link()
            except (RayError, GangBroken) as error:
                cause = str(error)
                continue
            for index, handle in members.items():
                if self.handles.get(index) is handle:
                    self._welcome(index)
            return
        self.failure = f"workers {list(members)} could not form their gang again: {cause}"

    def _welcome(self, index: int) -> None:
        if index not in self.healthy:
            self.healthy.add(index)
            self._on_ready(index)

    def _attend(self, index: int) -> None:
        self._spawn(self._watch(index, self.handles[index]))

    async def _watch(self, index: int, handle: Any) -> None:
        """Hear of the death of a worker at once, and of its silence in time."""
        death = result_of(handle.attend.remote())
        try:
            cause = await self._cause_of_death(index, handle, death)
        finally:
            death.cancel()
        if self.handles.get(index) is handle:
            self.lose(index, cause)

    async def _cause_of_death(self, index: int, handle: Any, death: asyncio.Future[Any]) -> str:
        while not death.done():
            await asyncio.wait([death], timeout=HEARTBEAT_S)
            if not death.done():
                try:
                    self.memory[index], _ = await asyncio.wait_for(
                        result_of(handle.ping.remote()), self.config.silence_s
                    )
                except TimeoutError:
                    return f"answered nothing for {self.config.silence_s:g} s"
                except RayActorError:
                    return "died"
        return "left" if death.exception() is None else "died"

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def result_of(ref: Any) -> asyncio.Future[Any]:
    """An object reference as a future of this event loop; nobody need wait for it."""
    future = asyncio.wrap_future(ref.future())
    future.add_done_callback(lambda done: None if done.cancelled() else done.exception())
    return future


async def _together(works: Iterable[Any]) -> None:
    """Await all; raise the first error once all are over, so that nothing goes on unseen."""
    results = await asyncio.gather(*works, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result.cause if isinstance(result, RayTaskError) else result
