"""Nothing that serves more than one request runs in the context of one."""

from __future__ import annotations

import ast
import asyncio
import gc
import inspect
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError

import deployments
import distriray.gang
from distriray.gang.background import Background
from distriray.gang.config import HostConfig
from distriray.gang.messages import StateLost
from distriray.gang.remote import FREQUENT, RemoteWorker, WorkerDied, _Actor, _own_error
from distriray.gang.worker import Worker

from .fleet import CALLER, until

STARTS = {
    "ensure_future", "create_task", "call_soon", "call_later", "call_at", "call_soon_threadsafe", "gather",
    "run_coroutine_threadsafe", "to_thread", "run_in_executor", "TaskGroup", "wait_for", "as_completed",
}  # fmt: skip
"""What hands the context of whoever calls it on to something that runs later."""

OWN = {
    ("gang/background.py", "close"): "waits for what runs already",
    ("gang/blocking.py", "*"): "threads of a script, which have no context to hand on",
    ("gang/worker.py", "*"): "the worker's side, which submits nothing",
    ("gang/segments.py", "come_back"): "begun and ended within a segment, which is a background task",
    ("gang/worker_group.py", "_together"): "awaited within the start of the host",
    ("gang/placement.py", "make"): "awaited within the start of the host",
    ("gang/calibrate.py", "_draw"): "awaited within the start of the host",
    ("gang/host.py", "stream"): "waits for the events of its own request",
    ("deployments/router.py", "_look"): "waits for reports, which are asked for in the background",
    ("deployments/watch.py", "*"): "waits for news, which are asked for in the background",
    ("deployments/callers.py", "_look"): "awaited within a background task",
    ("deployments/others.py", "answers"): "waits for answers, which are asked for in the background",
    ("deployments/http/disconnect.py", "cancel_on_disconnect"): "the work of its own request",
    ("deployments/http/routes/images.py", "*"): "encodes the answer to its own request",
}
"""What may start something in the context of its caller, and why that is right."""


def starts(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Every call in `folder` that starts something without saying in which context: file, function, call."""
    for path in sorted(folder.rglob("*.py")):
        file = str(path.relative_to(folder.parent))
        functions = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        for function in functions:
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
                    name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
                    if name in STARTS and all(keyword.arg != "context" for keyword in node.keywords):
                        yield file, function.name, name


def test_every_place_that_starts_something_in_its_callers_context_says_why() -> None:
    folders = [Path(distriray.gang.__file__).parent, Path(deployments.__file__).parent]
    found = {(file, name) for folder in folders for file, name, _ in starts(folder)}
    unknown = {place for place in found if place not in OWN and (place[0], "*") not in OWN}
    assert not unknown, f"use Background, or say why not: {sorted(unknown)}"
    gone = OWN.keys() - found - {(file, "*") for file, _ in found}
    assert not gone, f"nothing is started any more at {sorted(gone)}"


def calls_of(worker: type) -> list[str]:
    return [name for name, _ in inspect.getmembers(worker, inspect.isfunction) if not name.startswith("_")]


class Call:
    """An actor's method that does what `remote` does; `options` are what it was submitted with."""

    def __init__(self, remote: Callable[..., Any]) -> None:
        self.remote = remote
        self.given: dict[str, Any] = {}

    def options(self, **given: Any) -> Call:
        self.given = given
        return self


@pytest.mark.parametrize("method", [n for n in calls_of(RemoteWorker) if n not in {"kill", "share"}])
def test_a_call_to_a_worker_is_submitted_for_nobody(method: str) -> None:
    seen: list[str | None] = []

    def submit(*_: Any) -> Any:
        seen.append(CALLER.get())
        return SimpleNamespace(future=Future)

    async def scene() -> None:
        CALLER.set("somebody")
        call = Call(submit)
        remote = _Actor(SimpleNamespace(**{method: call}))
        arguments = len(inspect.signature(getattr(_Actor, method)).parameters) - 1
        getattr(remote, method)(*range(arguments))
        assert call.given == ({"enable_task_events": False} if method in FREQUENT else {})

    asyncio.run(scene())
    assert seen == [None]


def test_what_a_worker_is_called_with_and_raises_arrives_as_it_is() -> None:
    def ref(error: Exception | None) -> Any:
        future: Future[str] = Future()
        future.set_exception(error) if error else future.set_result("said")
        return SimpleNamespace(future=lambda: future)

    async def answer(error: Exception | None = None) -> Any:
        actor = SimpleNamespace(ping=Call(lambda: ref(error)))
        return await _Actor(actor).ping()

    def task_error(cause: Exception) -> RayTaskError:
        return RayTaskError("ping", "traceback", cause)

    async def scene() -> None:
        assert await answer() == "said"
        with pytest.raises(WorkerDied):
            await answer(ActorDiedError())
        with pytest.raises(ZeroDivisionError):
            await answer(task_error(ZeroDivisionError()))
        with pytest.raises(StateLost):
            await answer(task_error(ActorDiedError()))
        with pytest.raises(StateLost, match="no memory"):
            await answer(task_error(StateLost("no memory")))

    asyncio.run(scene())


DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: Worker
\tactor_id: 85c1121bf3a41f768a53cee301000000
\tpid: 31232
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR """


def _actor_died(told: str) -> RayActorError:
    error = RayActorError()
    error.error_msg = told
    return error


LOW_MEMORY = "Task was killed due to the node running low on memory.\nMemory on the node was 15.9GB / 16GB"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (_actor_died(DIED + 1000 * "x"), "The actor is dead because its worker process has died. Worker"),
        (OutOfMemoryError(LOW_MEMORY), LOW_MEMORY.replace("\n", " ")),
        (ActorDiedError(), "The actor died unexpectedly before finishing this task."),
    ],
    ids=["process", "memory", "unknown"],
)
def test_why_a_process_died_is_told_in_a_line(error: RayError, told: str) -> None:
    died = str(_own_error(error))
    assert died.startswith(told) and len(died) <= 301 and "\n" not in died and "class_name" not in died


def test_whoever_cannot_send_a_state_says_so_and_is_not_taken_for_whom_it_was_sent_to() -> None:
    """Ray lets a call raise what made its argument, as if it were its own error."""

    def fails(job: int) -> bytes:
        raise RuntimeError(f"device-side assert, job {job}")

    worker = Worker(HostConfig(workers=1), "cpu", "")
    worker._runner = SimpleNamespace(export=fails)  # type: ignore[assignment]
    with pytest.raises(StateLost, match="cannot be sent: .*device-side assert, job 3"):
        asyncio.run(worker.export(3))


def test_tasks_and_timers_of_an_owner_have_an_empty_context_and_tell_their_errors() -> None:
    async def scene() -> None:
        CALLER.set("somebody")
        told: list[Exception] = []
        seen: list[str | None] = []
        background = Background(told.append)

        def note() -> None:
            seen.append(CALLER.get())
            raise KeyError

        async def work() -> None:
            note()

        background.spawn(work())
        background.soon(note)
        background.later(0.001, note)
        await until(lambda: len(told) == 3)
        assert seen == [None] * 3 and CALLER.get() == "somebody"

    asyncio.run(scene())


def test_an_owner_that_closes_ends_its_tasks_and_hears_of_none() -> None:
    async def scene() -> None:
        told: list[Exception] = []
        background = Background(told.append)
        task = background.spawn(asyncio.sleep(60))
        await background.close()
        assert task.cancelled() and not told

    asyncio.run(scene())


def test_an_error_that_comes_as_the_host_ends_is_no_fault_of_the_program(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def scene() -> None:
        told: Future[str] = Future()
        actor = SimpleNamespace(ping=Call(lambda: SimpleNamespace(future=lambda: told)))
        loop = asyncio.new_event_loop()

        async def ask() -> None:
            _Actor(actor).ping()

        loop.run_until_complete(ask())
        told.set_exception(ActorDiedError())
        loop.call_soon(loop.stop)
        loop.run_forever()  # what is ready by now, and no more
        loop.close()

    scene()
    gc.collect()  # asyncio tells of an error when nobody can look at it any more
    assert not caplog.records


def test_an_answer_that_comes_after_the_end_of_the_loop_is_nobody_s() -> None:
    told: Future[str] = Future()
    actor = SimpleNamespace(ping=Call(lambda: SimpleNamespace(future=lambda: told)))

    async def ask() -> asyncio.Future[Any]:
        return _Actor(actor).ping()

    answer = asyncio.run(ask())
    told.set_result("said")
    assert not answer.done()


def test_an_answer_is_gone_as_soon_as_nobody_has_it() -> None:
    """Not when Python next looks for garbage: it may have megabytes of pictures."""

    async def ask() -> weakref.ref[Any]:
        told: Future[Any] = Future()
        actor = SimpleNamespace(ping=Call(lambda: SimpleNamespace(future=lambda: told)))
        answer = _Actor(actor).ping()
        told.set_result({"pictures"})
        return weakref.ref(await answer)

    gc.disable()
    try:
        assert asyncio.run(ask())() is None
    finally:
        gc.enable()
