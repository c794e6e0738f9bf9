"""A client by a handle: its coroutines do what its blocking methods do, and leaving one cancels its call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from distriray.errors import GenerationCancelled, QueueFull
from distriray.events import Event, Finished, Queued
from distriray.handle import HandleClient
from distriray.requests import GenerationRequest
from tests.unit.http.fake import result_of

REQUEST = GenerationRequest(prompt="a lake", height=64, width=64, model="m", seed=1)
RESULT = result_of(REQUEST)
EVENTS: list[Event] = [Queued(REQUEST.id, 0, 0.0), Finished(REQUEST.id, RESULT)]
ANSWERS: dict[str, Any] = {"generate": RESULT, "cancel": True, "models": ["m"], "fleet": "everybody"}


class Response:
    """What a handle's call returns: an answer, events, or an error; without one it never ends.

    It ends no sooner than `taken` by a replica.
    """

    def __init__(self, answer: Any, taken: Future[None]) -> None:
        self.answer, self.cancelled = answer, False
        self._replica_result_future = taken

    def result(self) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def __await__(self) -> Any:
        if self.answer is None:
            yield from asyncio.sleep(60).__await__()
        return self.result()

    def __iter__(self) -> Any:
        yield from self.result()

    async def __aiter__(self) -> Any:
        for event in self.result():
            yield event

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Answers every method, and keeps what it was asked."""

    app_name = "distriray"

    def __init__(
        self, answers: dict[str, Any], gone: Exception | None = None, taken: Future[None] | None = None
    ) -> None:
        self.answers, self.gone = {**ANSWERS, "stream": EVENTS, **answers}, gone
        self.taken = Future[None]() if taken is None else taken
        if taken is None:
            self.taken.set_result(None)
        self.asked: list[tuple[Any, ...]] = []
        self.responses: list[Response] = []

    def options(self, stream: bool) -> Handle:
        assert stream
        return self

    def __getattr__(self, method: str) -> Any:
        class Method:
            @staticmethod
            def remote(*args: Any) -> Response:
                if self.gone is not None:
                    raise self.gone
                self.asked.append((method, *args))
                self.responses.append(Response(self.answers[method], self.taken))
                return self.responses[-1]

        return Method


async def collected(events: Any) -> list[Event]:
    return [event async for event in events]


CALLS: dict[str, tuple[Callable[[HandleClient], Any], Callable[[HandleClient], Any]]] = {
    "generate": (lambda client: client.generate(REQUEST), lambda client: client.agenerate(REQUEST)),
    "stream": (
        lambda client: list(client.stream(REQUEST)),
        lambda client: collected(client.astream(REQUEST)),
    ),
    "cancel": (lambda client: client.cancel("id"), lambda client: client.acancel("id")),
    "models": (lambda client: client.models(), lambda client: client.amodels()),
    "fleet": (lambda client: client.fleet(), lambda client: client.afleet()),
}
every_call = pytest.mark.parametrize(("blocks", "awaits"), CALLS.values(), ids=CALLS)
Call = Callable[[HandleClient], Any]


@every_call
def test_coroutines_ask_and_answer_as_the_blocking_methods_do(blocks: Call, awaits: Call) -> None:
    one, other = Handle({}), Handle({})
    answer = blocks(HandleClient(one))
    assert answer == asyncio.run(awaits(HandleClient(other))) and answer
    assert one.asked == other.asked and len(one.asked) == 1
    assert not one.responses[0].cancelled and not other.responses[0].cancelled


@every_call
def test_where_no_call_can_be_made_the_service_cannot_be_reached(blocks: Call, awaits: Call) -> None:
    client = HandleClient(Handle({}, gone=RayServeException("the application was deleted")))
    with pytest.raises(ConnectionError, match="cannot be reached.*was deleted"):
        blocks(client)
    with pytest.raises(ConnectionError, match="cannot be reached.*was deleted"):
        asyncio.run(awaits(client))


@every_call
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RayTaskError("f", "traceback", QueueFull("full", 1.0)), QueueFull),
        (RayServeException("gone"), ConnectionError),
    ],
    ids=["of the service", "of Ray"],
)
def test_errors_are_themselves_either_way(
    blocks: Call, awaits: Call, error: Exception, raised: type[Exception]
) -> None:
    handle = Handle(dict.fromkeys(CALLS, error))
    with pytest.raises(raised):
        blocks(HandleClient(handle))
    with pytest.raises(raised):
        asyncio.run(awaits(HandleClient(handle)))


@every_call
def test_a_call_that_somebody_else_cancelled_is_no_cancellation_of_who_awaits_it(
    blocks: Call, awaits: Call
) -> None:
    handle = Handle(dict.fromkeys(CALLS, asyncio.CancelledError()))
    with pytest.raises(GenerationCancelled):
        asyncio.run(awaits(HandleClient(handle)))


def test_whoever_leaves_a_coroutine_cancels_its_call() -> None:
    async def leave(awaits: Call, handle: Handle) -> None:
        task = asyncio.ensure_future(awaits(HandleClient(handle)))
        while not handle.responses:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    for name in ("generate", "cancel", "models", "fleet"):
        handle = Handle({name: None})
        asyncio.run(leave(CALLS[name][1], handle))
        assert handle.responses[0].cancelled, name


def test_whoever_closes_a_stream_cancels_its_call() -> None:
    async def close(handle: Handle) -> None:
        events = HandleClient(handle).astream(REQUEST)
        assert isinstance(await anext(events), Queued)
        await events.aclose()

    one, other = Handle({}), Handle({})
    events = HandleClient(one).stream(REQUEST)
    assert isinstance(next(events), Queued)
    events.close()
    asyncio.run(close(other))
    assert one.responses[0].cancelled and other.responses[0].cancelled


def test_a_stream_that_ends_without_a_picture_broke_off() -> None:
    blocks, awaits = CALLS["stream"]
    for call in (blocks, lambda client: asyncio.run(awaits(client))):
        with pytest.raises(ConnectionError, match=f"broke off before request {REQUEST.id}"):
            call(HandleClient(Handle({"stream": EVENTS[:1]})))


class Applications:
    """Serve's applications by its status: `states` are those of the client's, one a look; None is gone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *states: str | None) -> None:
        self.states, self.last = list(states), Future[None]()
        monkeypatch.setattr("distriray.handle.LOOK_S", 0.001)
        monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=self.look()))

    def look(self) -> dict[str, Any]:
        state = self.states.pop(0)
        if not self.states:
            self.last.set_result(None)
        return {} if state is None else {"distriray": SimpleNamespace(status=state)}


@every_call
@pytest.mark.parametrize("end", ["DELETING", None])
def test_what_no_router_takes_ends_where_the_application_is_deleted(
    monkeypatch: pytest.MonkeyPatch, blocks: Call, awaits: Call, end: str | None
) -> None:
    for call in (blocks, lambda client: asyncio.run(awaits(client))):
        Applications(monkeypatch, "RUNNING", "DEPLOYING", end)
        handle = Handle({}, taken=Future())
        with pytest.raises(ConnectionError, match="'distriray' is not on this cluster any more"):
            call(HandleClient(handle))
        assert handle.responses[0].cancelled


@every_call
def test_a_call_waits_for_a_router_while_there_is_an_application(
    monkeypatch: pytest.MonkeyPatch, blocks: Call, awaits: Call
) -> None:
    for call in (blocks, lambda client: asyncio.run(awaits(client))):
        applications = Applications(monkeypatch, "DEPLOYING", "UNHEALTHY", "RUNNING")
        assert call(HandleClient(Handle({}, taken=applications.last)))
        assert not applications.states


@every_call
def test_an_application_that_is_no_more_is_named(blocks: Call, awaits: Call) -> None:
    gone = DeploymentUnavailableError(DeploymentID("Ingress", "distriray"))
    for call in (blocks, lambda client: asyncio.run(awaits(client))):
        with pytest.raises(ConnectionError, match="application 'distriray' is deleted, or could not be"):
            call(HandleClient(Handle(dict.fromkeys(CALLS, gone))))
