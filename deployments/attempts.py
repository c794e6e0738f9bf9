"""One request on its way through a router: hosts that were tried, and whether anybody still wants it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from deployments.pool_client import PoolClient
from distriray.errors import GenerationCancelled
from distriray.events import Event, Preview, Queued, Step
from distriray.requests import GenerationRequest


@dataclass
class Attempts:
    """The attempts at one request, which has a seed from the first one on.

    Attributes:
        give_up_s: seconds after which the client gives up; None is never.
        began_s: when the client asked, on the monotonic clock.
        count: hosts that it was sent to in vain.
        wakes: pools that it waited for.
        host: the host that was sent it last, unless that was in vain.
        sent: hosts that were sent it in vain, and may have it yet.
        unwanted: somebody has cancelled it: no further host gets it.
        queued, step, previews: what a stream has shown, so that another attempt does not show it again.
    """

    request: GenerationRequest
    give_up_s: float | None = None
    began_s: float = field(default_factory=time.monotonic)
    count: int = 0
    wakes: int = 0
    host: tuple[PoolClient, str] | None = None
    sent: set[str] = field(default_factory=set)
    unwanted: bool = False
    queued: bool = False
    step: int = 0
    previews: int = 0
    _called_off: bool = field(default=False, init=False)
    _limit: asyncio.Timeout | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.request = self.request.seeded()

    def left_s(self, now_s: float) -> float | None:
        """Seconds until its deadline, which counts from when the client asked; None without one."""
        deadline_s = self.request.deadline_s
        return None if deadline_s is None else self.began_s + deadline_s - now_s

    def shows(self, event: Event) -> bool:
        """Whether `event` is new to the client that listens."""
        match event:
            case Queued():
                new, self.queued = not self.queued, True
                return new
            case Step(step=step):
                new, self.step = step > self.step, max(step, self.step)
                return new
            case Preview(index=index):
                new, self.previews = index >= self.previews, max(index + 1, self.previews)
                return new
            case _:
                return True

    @asynccontextmanager
    async def going_on(self) -> AsyncGenerator[None, None]:
        """Work on it while the block runs.

        Raises:
            GenerationCancelled: it was called off, which ends the block.
        """
        try:
            async with asyncio.timeout(0 if self._called_off else None) as self._limit:
                yield
        except TimeoutError:
            if not self._called_off:
                raise
        finally:
            self._limit = None
        if self._called_off:  # maybe too late to end the block
            raise self.cancelled()

    def cancelled(self) -> GenerationCancelled:
        """The error of a request that was cancelled."""
        return GenerationCancelled(f"request {self.request.id} was cancelled")

    def call_off(self) -> None:
        """End it: now, or as soon as anybody goes on with it."""
        if not self._called_off:
            self._called_off = True
            if self._limit is not None:
                self._limit.reschedule(asyncio.get_running_loop().time())
