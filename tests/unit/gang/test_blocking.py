"""A host for scripts, without Ray."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from distriray.gang import HostConfig, blocking, open_host


@pytest.fixture(autouse=True)
def interrupts_interrupt() -> Iterator[None]:
    """Whoever runs the tests in a shell's background hands an ignored SIGINT down."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_while_a_host_starts_waits_for_what_it_gives_back(
    monkeypatch: pytest.MonkeyPatch,
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
    with pytest.raises(KeyboardInterrupt), open_host(HostConfig()):
        pass
    assert given_back == ["bundles"]


def test_an_interrupt_that_comes_as_a_host_has_started_closes_it(monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(KeyboardInterrupt), open_host(HostConfig()):
        pass
    assert closed == ["host"]
