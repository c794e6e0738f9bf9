"""Tasks that belong to a host or to a router, and not to the client that happened to cause them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any


class Background:
    """The tasks and timers of one owner. All methods belong to one event loop.

    Each runs in an empty context. Ray and Serve keep in context variables for whom a call is made, and cancel
    what was submitted for a client that leaves; asyncio hands the variables of a task on to those it starts.
    So what serves more than one request, or outlives one, would end with the client that caused it.

    Args:
        on_error: hears of every task and every timer that ends with an error.
    """

    def __init__(self, on_error: Callable[[Exception], None]) -> None:
        self._on_error = on_error
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Begin `work`, whose result nobody need wait for."""
        task = asyncio.get_running_loop().create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._over, context=Context())
        return task

    def soon(self, callback: Callable[[], None]) -> None:
        """Call `callback` once what happens now is over."""
        asyncio.get_running_loop().call_soon(self._call, callback, context=Context())

    def later(self, delay_s: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        """Call `callback` in `delay_s` seconds."""
        return asyncio.get_running_loop().call_later(delay_s, self._call, callback, context=Context())

    async def close(self) -> None:
        """Cancel all tasks, and return once they are over."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _call(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except StopIteration as error:  # which no future can hold; to tasks it happens by itself
            told = RuntimeError(f"{callback!r} raised StopIteration")
            told.__cause__ = error
            self._on_error(told)
        except Exception as error:
            self._on_error(error)

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._on_error(error)
