"""What a program asked for ends with the program."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import pytest

from deployments import callers
from deployments.callers import Callers

from ..gang.fleet import CALLER, until


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callers, "LOOK_S", 0.001)


def test_what_a_dead_driver_asked_for_is_cancelled_for_nobody_and_all_else_goes_on() -> None:
    async def scene() -> None:
        dead: set[str] = set()
        ended, looks = {name: asyncio.Event() for name in "abcd"}, 0
        cancelled: list[str] = []

        def look(_: Collection[str]) -> set[str]:
            nonlocal looks
            looks += 1
            return dead

        async def cancel(name: str) -> None:
            assert CALLER.get() is None
            cancelled.append(name)
            ended[name].set()

        async def ask(driver: str | None, name: str) -> None:
            CALLER.set(name)
            with known.waiting(driver, name):
                await ended[name].wait()

        known = Callers(cancel, look)
        work = [("01", "a"), ("01", "b"), ("02", "c"), (None, "d")]
        tasks = [asyncio.ensure_future(ask(*one)) for one in work]
        await until(lambda: looks > 2)
        assert not cancelled
        dead.add("01")
        await until(lambda: sorted(cancelled) == ["a", "b"])
        before = looks
        await until(lambda: looks > before + 2)
        assert sorted(cancelled) == ["a", "b"] and not tasks[2].done() and not tasks[3].done()
        for event in ended.values():
            event.set()
        await asyncio.gather(*tasks)
        await until(lambda: known._watching is not None and known._watching.done())
        with known.waiting("02", "e"):  # it looks again for whoever comes later
            before = looks
            await until(lambda: looks > before)

    asyncio.run(scene())


def test_a_look_that_fails_does_not_end_the_watch_for_those_who_come_later() -> None:
    async def scene() -> None:
        cancelled: list[str] = []
        fails = True

        def look(_: Collection[str]) -> set[str]:
            nonlocal fails
            if fails:
                fails = False
                raise ConnectionError("the head node is gone")
            return {"01"}

        async def cancel(name: str) -> None:
            cancelled.append(name)

        known = Callers(cancel, look)
        with known.waiting("01", "a"):
            await until(lambda: cancelled)

    asyncio.run(scene())


def test_a_request_that_is_there_twice_is_known_until_both_are_over() -> None:
    """The second is refused, and ends at once; the first goes on."""

    async def scene() -> None:
        cancelled: list[str] = []

        async def cancel(name: str) -> None:
            cancelled.append(name)

        known = Callers(cancel, lambda _: {"01"})
        with known.waiting("01", "a"):
            with known.waiting("01", "a"):
                pass
            await until(lambda: cancelled)

    asyncio.run(scene())
