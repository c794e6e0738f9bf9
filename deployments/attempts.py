"""One request on its way through a router: hosts that were tried, and the wait for a first one."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

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
        queued, step, previews: what a stream has shown, so that another attempt does not show it again.
    """

    request: GenerationRequest
    give_up_s: float | None = None
    began_s: float = field(default_factory=time.monotonic)
    count: int = 0
    wakes: int = 0
    queued: bool = False
    step: int = 0
    previews: int = 0

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


@dataclass
class Wait:
    """A request that waits for a first host, until `limit` runs out or somebody calls it off."""

    limit: asyncio.Timeout
    called_off: bool = False

    def call_off(self) -> None:
        """End it now."""
        self.called_off = True
        self.limit.reschedule(asyncio.get_running_loop().time())
