"""A host's workers: started, linked into gangs, watched, and replaced in place when they die."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from distriray.errors import GangBroken
from distriray.gang.background import Background
from distriray.gang.config import HostConfig
from distriray.gang.devices import DEVICES
from distriray.gang.messages import ALONE, GangMembership, WorkerFacts, WorkerId
from distriray.gang.remote import RemoteWorker, WorkerDied
from distriray.routing.buddy import aligned_blocks
from distriray.status import AdapterStatus

log = logging.getLogger("ray.serve.distriray")

REPAIR_ATTEMPTS = 3
HEARTBEAT_S = 5.0
REMEMBERED = 256
"""Repairs that are told one by one; beyond them they are counted."""

Group = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Repair:
    """A worker that died and was replaced; `seconds` from its death to its place in every gang."""

    worker: int
    cause: str
    seconds: float


@dataclass(slots=True)
class Member:
    """A worker that has its model; `memory` in bytes and `adapters` as they were told last."""

    id: WorkerId
    remote: RemoteWorker
    facts: WorkerFacts
    memory: int
    adapters: AdapterStatus = AdapterStatus()


class Owner(Protocol):
    """Whoever lends the workers."""

    def worker_out(self, index: int) -> None:
        """Nobody may be sent to this worker until it is ready again; what it holds may still be had."""

    def worker_dead(self, worker: WorkerId) -> None:
        """This process is gone with all that it held. It was out before."""

    def worker_ready(self, index: int) -> None:
        """There is a worker in this place that can be lent."""

    def at_rest(self) -> AbstractAsyncContextManager[None]:
        """A time in which nobody works, as soon as everybody has left the step that they are in."""

    def beyond_repair(self) -> None:
        """Some gangs will never be there again: `WorkerGroup.sizes` has fewer, or none."""

    def unfinished(self) -> tuple[Collection[int], int]:
        """The numbers of all jobs that are not over, and of the newest that there was."""


class WorkerGroup:
    """The workers of one host. All methods belong to one event loop.

    A place (an index) is filled by one process after another, each with a `WorkerId` of its own. `replace` is
    where a process goes; the place is filled again in the background.

    Args:
        launch: starts a process for a place.

    Attributes:
        communicators: the communicator's name of every group that is ready to be lent.
        healthy: places whose workers are loaded and linked.
        facts: what the worker of each place reported, or the one before it until then.
        repairs: the last ones.
        repaired: how many there were.
        failure: why the group cannot be repaired, or None.
    """

    def __init__(self, config: HostConfig, launch: Callable[[int], RemoteWorker], owner: Owner) -> None:
        self.config = config
        self.communicators: dict[Group, str] = {}
        self.healthy: set[int] = set()
        self.facts: dict[int, WorkerFacts] = {}
        self.repairs: deque[Repair] = deque(maxlen=REMEMBERED)
        self.repaired = 0
        self.failure: str | None = None
        self._launch, self._owner = launch, owner
        self._members: dict[int, Member] = {}
        self._lost: Counter[int] = Counter()
        self._beyond_repair: set[int] = set()
        self._groups = aligned_blocks(config.workers, config.sizes)
        self._generations, self._incarnations = itertools.count(), itertools.count()
        self._linking = asyncio.Lock()
        self._background = Background(self._fail)
        self._closing = False

    async def start(self) -> None:
        """Start and load all workers, and form every gang once.

        Raises:
            ModelNotFound, UnsupportedModel, UnusableAdapter, GangBroken: as the workers do.
        """
        members = await _together(self._bring_up(index) for index in range(self.config.workers))
        for member in members:
            self._background.spawn(self._watch(member))
        failed = await self._link()
        for worker, error in sorted(failed.items(), key=lambda each: isinstance(each[1], GangBroken)):
            if isinstance(error, WorkerDied | TimeoutError):
                raise GangBroken(f"worker {worker.index} could not join a gang: {error}") from error
            raise error
        self.healthy.update(member.id.index for member in members if self.alive(member.id))

    @property
    def sizes(self) -> set[int]:
        """Of the gangs that can be formed, now or when repairs are done."""
        return {len(group) for group in self._groups if self._beyond_repair.isdisjoint(group)}

    @property
    def members(self) -> list[Member]:
        """The workers that live, in the order of their places."""
        return [member for _, member in sorted(self._members.items())]

    def member(self, index: int) -> Member | None:
        """The worker in a place now."""
        return self._members.get(index)

    def alive(self, worker: WorkerId) -> bool:
        """Whether this very process lives."""
        return self.remote(worker) is not None

    def remote(self, worker: WorkerId) -> RemoteWorker | None:
        """The way to this very process, while it lives."""
        member = self._members.get(worker.index)
        return member.remote if member is not None and member.id == worker else None

    def replace(self, worker: WorkerId, cause: str) -> None:
        """This process is dead or is to be given up: replace it in the background. Idempotent."""
        if not self.alive(worker) or self._closing:
            return
        index = worker.index
        log.warning("worker %d (process %d) is lost: %s", index, self.facts[index].pid, cause)
        self._members.pop(index).remote.kill()
        self.communicators = {group: name for group, name in self.communicators.items() if index not in group}
        self.healthy.discard(index)
        self._owner.worker_out(index)
        self._owner.worker_dead(worker)
        self._lost[index] += 1
        if self._lost[index] > REPAIR_ATTEMPTS:
            self._give_up([index], f"worker {index} was lost {self._lost[index]} times on end: {cause}")
        else:
            self._background.spawn(self._refill(index, cause, time.monotonic()))

    def proved(self, worker: WorkerId) -> None:
        """This process has done what it was asked: whatever ailed those before it is over."""
        if self.alive(worker):
            del self._lost[worker.index]

    def reform(self, gang: Sequence[WorkerId]) -> None:
        """The communicator of `gang` broke: its members are out until all that they need is made anew."""
        self.communicators.pop(tuple(worker.index for worker in gang), None)
        living = [worker for worker in gang if self.alive(worker)]
        for worker in living:
            self.healthy.discard(worker.index)
            self._owner.worker_out(worker.index)
        self._background.spawn(self._rejoin(living))

    async def close(self) -> None:
        """End every worker. Idempotent."""
        self._closing = True
        for member in self._members.values():
            member.remote.kill()
        self._members.clear()
        self.healthy.clear()
        await self._background.close()

    async def _bring_up(self, index: int) -> Member:
        """Start a worker and load its weights; only then is it a member. Raises as `start`."""
        remote, longest_s = self._launch(index), self.config.start_timeout_s
        try:
            async with asyncio.timeout(longest_s) as limit:
                facts = await remote.load()
        except BaseException as error:
            remote.kill()
            if isinstance(error, WorkerDied):
                raise GangBroken(f"worker {index} died while it loaded its model: {error}") from error
            if limit.expired():
                late = f"worker {index} did not load its model within {longest_s:g} s (`start_timeout_s`)"
                raise GangBroken(late) from error
            raise
        member = Member(WorkerId(index, next(self._incarnations)), remote, facts, facts.memory)
        self._members[index], self.facts[index] = member, facts
        return member

    async def _link(self) -> dict[WorkerId, Exception]:
        """Form every group that is not formed and whose members all live; what those who could not raised."""
        async with self._linking, self._peace():
            members, missing = dict(self._members), self._missing()
            names = {g: f"{'-'.join(map(str, g))}.{next(self._generations)}" for g in missing if len(g) > 1}
            plans = {
                members[index].id: [
                    GangMembership(group=group, name=name, rank=group.index(index), world_size=len(group))
                    for group, name in names.items()
                    if index in group
                ]
                for index in {index for group in names for index in group}
            }
            works = {worker: members[worker.index].remote.link(links) for worker, links in plans.items()}
            if works:
                patience_s = self.config.timeout_s * (1 + max(map(len, plans.values())))
                await asyncio.wait(works.values(), timeout=patience_s)
            failed: dict[WorkerId, Exception] = {}
            for worker, work in works.items():
                if not work.done():
                    failed[worker] = TimeoutError(f"joined no gang within {patience_s:g} s")
                elif isinstance(error := work.exception(), Exception):
                    failed[worker] = error
            for group in missing:
                gang = [members[index].id for index in group]
                if all(self.alive(worker) and worker not in failed for worker in gang):
                    self.communicators[group] = names.get(group, ALONE)
            return failed

    def _missing(self) -> list[Group]:
        """Groups that are not formed and whose members all live."""
        return [g for g in self._groups if g not in self.communicators and self._members.keys() >= set(g)]

    def _peace(self) -> AbstractAsyncContextManager[None]:
        """The time to form what is missing."""
        kinds = {DEVICES[member.facts.device_type] for member in self.members}
        at_rest = any(kind.links_at_rest for kind in kinds) and any(len(g) > 1 for g in self._missing())
        return self._owner.at_rest() if at_rest else nullcontext()

    async def _link_all(self) -> str | None:
        """`_link` until nobody fails, or why somebody does. Who fails alone is given up, and fails no others.

        Nobody is to blame for a peer that is silent: it answers again, or `_watch` replaces it.
        """
        attempts = 0
        while True:
            if answers := [member.remote.ping() for member in self.members]:
                await asyncio.wait(answers, timeout=HEARTBEAT_S + self.config.silence_s)
            failed = await self._link()
            if not failed:
                return None
            alone = {worker: error for worker, error in failed.items() if not isinstance(error, GangBroken)}
            for worker, error in alone.items():
                self.replace(worker, f"could not join a gang: {error!r}")
            attempts += not alone
            if attempts == REPAIR_ATTEMPTS:
                return "; ".join({str(error) for error in failed.values()})

    async def _refill(self, index: int, cause: str, died: float) -> None:
        for attempt in range(REPAIR_ATTEMPTS):
            try:
                member = await self._bring_up(index)
            except Exception as error:
                cause = f"{cause}; attempt {attempt + 1}: {error!r}"
                which = f"attempt {attempt + 1} of {REPAIR_ATTEMPTS}"
                log.warning("worker %d did not start again, %s: %r", index, which, error)
                continue
            self._background.spawn(self._watch(member))
            await self._rejoin([member.id])
            if self.alive(member.id) and index in self.healthy:
                self.repaired += 1
                self.repairs.append(Repair(index, cause, time.monotonic() - died))
                pid, seconds = member.facts.pid, self.repairs[-1].seconds
                log.info("worker %d is replaced by process %d, after %.1f s", index, pid, seconds)
            return
        self._give_up([index], f"worker {index} could not be replaced: {cause}")

    async def _rejoin(self, workers: Sequence[WorkerId]) -> None:
        """Let them be lent once they are in all gangs that they can be in."""
        if (cause := await self._link_all()) is not None:
            places = [worker.index for worker in workers]
            self._give_up(places, f"workers {places} could not form their gangs: {cause}")
            return
        for worker in workers:
            if self.alive(worker) and worker.index not in self.healthy:
                self.healthy.add(worker.index)
                self._owner.worker_ready(worker.index)

    async def _watch(self, member: Member) -> None:
        """Hear of the death of a worker at once, and of its silence in time; tell it what it may forget."""
        death = member.remote.until_death()
        try:
            while not death.done() and not self._closing:
                await asyncio.wait([death], timeout=HEARTBEAT_S)
                if not death.done():
                    member.remote.retain(*self._owner.unfinished())
                    async with asyncio.timeout(self.config.silence_s):
                        member.memory, _ = await member.remote.ping()
            cause = "left"
            await death
        except TimeoutError:
            cause = f"answered nothing for {self.config.silence_s:g} s"
        except WorkerDied as error:
            cause = f"died: {error}"
        except Exception as error:
            cause = f"failed: {error!r}"
        finally:
            death.cancel()
        self.replace(member.id, cause)

    def _give_up(self, places: Collection[int], cause: str) -> None:
        """These places are beyond repair, and with them the host, though others may still work."""
        log.error("workers %s are beyond repair, and this host with them: %s", sorted(places), cause)
        self.failure = cause
        self._beyond_repair.update(places)
        self._owner.beyond_repair()

    def _fail(self, error: Exception) -> None:
        """A background task has ended with an error that nobody thought of: trust no place."""
        log.error("a host's repairs failed by a fault of their own", exc_info=error)
        self._give_up(range(self.config.workers), f"the host's own fault: {error!r}")


async def _together(works: Iterable[Any]) -> list[Any]:
    """Await all; raise the first error once all are over, so that nothing goes on unseen."""
    results = await asyncio.gather(*works, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
