"""A client by a handle: its coroutines do what its blocking methods do, and leaving one cancels its call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import RayTaskError
from ray.serve.exceptions import RayServeException

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
    """What a handle's call returns: an answer, events, or an error; without one it never ends."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.cancelled = answer, False

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

    def __init__(self, answers: dict[str, Any], gone: Exception | None = None) -> None:
        self.answers, self.gone = {**ANSWERS, "stream": EVENTS, **answers}, gone
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
                self.responses.append(Response(self.answers[method]))
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
