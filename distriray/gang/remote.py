"""A worker process as its host reaches it: the only place that submits calls to workers."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from contextvars import Context
from typing import Any, Protocol

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError

from distriray.collective import serve_store
from distriray.gang.config import HostConfig
from distriray.gang.messages import (
    GangMembership,
    Progress,
    RankResult,
    SegmentOrder,
    StateLost,
    StopSignal,
    WorkerFacts,
)
from distriray.gang.placement import Placement
from distriray.gang.worker import Worker
from distriray.picture import Picture

FREQUENT = "watch", "retain", "ping"
"""Calls that Ray is to keep no events of: there are many a second, and its GCS holds those of 100,000."""


WHY_CHARS = 300
"""Of what Ray says of a death, at most."""


class WorkerDied(Exception):
    """The process is gone, or nothing can be sent to it; says why, in a line."""


class RemoteWorker(Protocol):
    """One worker process. Calls are sent when they are made, in this order.

    Awaiting an answer raises `WorkerDied` once the process is gone, else what the worker raised.
    """

    def load(self) -> asyncio.Future[WorkerFacts]: ...

    def link(self, links: Sequence[GangMembership]) -> asyncio.Future[None]: ...

    def run(self, order: SegmentOrder, state: Any, pictures: Any) -> asyncio.Future[RankResult]:
        """As `Worker.run`; `state` is what `export` gave, `pictures` what `share` gave, or None.

        Raises StateLost too.
        """

    def share(self, pictures: Mapping[str, Picture]) -> Any:
        """One copy of `pictures` for all workers, to be handed to `run`; it goes when no run has it."""

    def export(self, job: int) -> Any:
        """The state of a job, to be handed to `run` of other workers; nothing waits for it here."""

    def watch(self, serial: int, seen: int) -> asyncio.Future[Progress]: ...

    def stop(self, serial: int, signal: StopSignal) -> None:
        """As `Worker.stop`; nobody waits for it."""

    def retain(self, jobs: Collection[int], newest: int) -> None:
        """As `Worker.retain`; nobody waits for it."""

    def ping(self) -> asyncio.Future[tuple[int, int]]: ...

    def until_death(self) -> asyncio.Future[None]: ...

    def kill(self) -> None:
        """End the process at once."""


class Launcher:
    """Starts the worker processes of one host, which meet each other at one store."""

    def __init__(self, config: HostConfig, placement: Placement) -> None:
        self._config, self._placement = config, placement
        self._store = serve_store(ray.util.get_node_ip_address())

    def __call__(self, index: int) -> RemoteWorker:
        """A new process in the place of worker `index`, without a model yet."""
        actor = ray.remote(Worker).options(name=None, **self._placement.options(index))
        make = Context().run(actor.remote, self._config, self._placement.device, self._store.address)
        return _Actor(make)


class _Actor:
    """A `RemoteWorker` that is a Ray actor.

    Ray makes a call the child of the task in whose context it is submitted, and cancels it with that. A
    worker serves everybody, so every call is submitted in an empty context.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def load(self) -> asyncio.Future[WorkerFacts]:
        return self._answer("load")

    def link(self, links: Sequence[GangMembership]) -> asyncio.Future[None]:
        return self._answer("link", links)

    def run(self, order: SegmentOrder, state: Any, pictures: Any) -> asyncio.Future[RankResult]:
        return self._answer("run", order, state, pictures)

    def share(self, pictures: Mapping[str, Picture]) -> Any:
        return Context().run(ray.put, pictures)

    def export(self, job: int) -> Any:
        return self._submit("export", job)

    def watch(self, serial: int, seen: int) -> asyncio.Future[Progress]:
        return self._answer("watch", serial, seen)

    def stop(self, serial: int, signal: StopSignal) -> None:
        self._submit("stop", serial, signal)

    def retain(self, jobs: Collection[int], newest: int) -> None:
        self._submit("retain", jobs, newest)

    def ping(self) -> asyncio.Future[tuple[int, int]]:
        return self._answer("ping")

    def until_death(self) -> asyncio.Future[None]:
        return self._answer("until_death")

    def kill(self) -> None:
        Context().run(ray.kill, self._actor)

    def _submit(self, method: str, *args: Any) -> Any:
        call = getattr(self._actor, method)
        if method in FREQUENT:
            call = call.options(enable_task_events=False)
        return Context().run(call.remote, *args)

    def _answer(self, method: str, *args: Any) -> asyncio.Future[Any]:
        """What the worker answers. Nobody need wait for it: then its error is no fault of the program."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()

        def settle(told: Future[Any]) -> None:
            if answer.done():
                return
            if told.cancelled():
                answer.cancel()
            elif (error := told.exception()) is None:
                answer.set_result(told.result())
            else:
                answer.set_exception(_own_error(error))
                answer.exception()  # it has been seen

        def hear(told: Future[Any]) -> None:  # `told` keeps this: if this kept it, its pictures would stay
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(settle, told, context=Context())

        self._submit(method, *args).future().add_done_callback(hear)
        return answer


def _own_error(error: BaseException) -> BaseException:
    """The error that a worker raised, or one of ours in place of Ray's own."""
    if isinstance(error, RayTaskError):
        if not isinstance(error.cause, RayActorError | ObjectLostError | RayTaskError):
            return error.cause
        lost = StateLost(f"lost on the way: {_why(error.cause)}")  # an argument's error
        lost.__cause__ = error
        return lost
    if isinstance(error, RayError):
        died = WorkerDied(_why(error))
        died.__cause__ = error
        return died
    return error


def _why(error: RayError) -> str:
    """What Ray says of a death, without its list of ids and addresses."""
    lines = [line for line in str(error).splitlines() if line and not line.startswith("\t")]
    told = " ".join(lines[1:] or lines) if isinstance(error, RayActorError) else " ".join(lines)
    return told if len(told) <= WHY_CHARS else f"{told[:WHY_CHARS]}…"
