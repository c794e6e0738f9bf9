"""A host for scripts, without Ray."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest

from distriray.events import Event, Queued
from distriray.gang import HostConfig, blocking, open_host
from distriray.gang.blocking import BlockingHost
from distriray.requests import GenerationRequest


@pytest.fixture(autouse=True, params=[KeyboardInterrupt, SystemExit])
def interrupt(request: pytest.FixtureRequest) -> Iterator[type[BaseException]]:
    """What a signal raises: of a SIGTERM, Ray makes a SystemExit."""

    def interrupt(*_: object) -> None:
        raise request.param

    before = signal.signal(signal.SIGINT, interrupt)
    yield request.param
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_while_a_host_starts_waits_for_what_it_gives_back(
    interrupt: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[str] = []
    main = threading.get_ident()

    async def start(*_: Any) -> None:
        signal.pthread_kill(main, signal.SIGINT)
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.1)
            given_back.append("bundles")

    monkeypatch.setattr(blocking.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(blocking.Host, "start", start)
    with pytest.raises(interrupt), open_host(HostConfig()):
        pass
    assert given_back == ["bundles"]


def test_an_interrupt_that_comes_as_a_host_has_started_closes_it(
    interrupt: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    main = threading.get_ident()

    class Started:
        async def close(self) -> None:
            closed.append("host")

    async def start(*_: Any) -> Started:
        signal.pthread_kill(main, signal.SIGINT)
        return Started()

    monkeypatch.setattr(blocking.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(blocking.Host, "start", start)
    with pytest.raises(interrupt), open_host(HostConfig()):
        pass
    assert closed == ["host"]


def test_an_interrupt_cancels_what_a_host_is_asked_for(interrupt: type[BaseException]) -> None:
    main, ended = threading.get_ident(), threading.Event()

    class Drawing:
        async def stream(self, _: GenerationRequest) -> AsyncGenerator[Event, None]:
            while sys._current_frames()[main].f_code.co_name != "wait":
                await asyncio.sleep(0.01)
            signal.pthread_kill(main, signal.SIGINT)
            try:
                await asyncio.sleep(60)
                yield Queued("x", 0, 0.0)
            finally:
                ended.set()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        with pytest.raises(interrupt):
            list(BlockingHost(Drawing(), loop).stream(GenerationRequest(prompt="a lake")))  # type: ignore[arg-type]
        assert ended.wait(20)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
