"""Clients that ask without pause, and what came of it."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from statistics import median, quantiles

from PIL import Image

from bench.endurance.scenes import Scene
from bench.report import Report
from distriray import AsyncClient, GenerationRequest, HandleClient
from distriray.errors import DeadlineUnmet, DistrirayError, GenerationCancelled, QueueFull
from distriray.events import Event, Finished
from distriray.results import GenerationResult

BY_HANDLE = 0.25
"""Share of the requests that go by handle; the others go over HTTP."""
LEAVES_AFTER_S = (0.0, 3.0)
DEADLINE_S = (1.0, 15.0)
PAUSE_S = 0.5
TRIES = 20
"""How often a client asks the same again, where the service broke off or its queue was full."""


COLUMNS = ("what", "count", "p50 s", "p95 s", "most s")
NO_SECONDS = ("", "", "")


class Lost(Exception):
    """A stream had an end, and no result."""


End = GenerationResult | str
"""What a request came to: its result, or the end that its client wanted."""


@dataclass(frozen=True)
class Door:
    """A way into the service, and whether it carries priorities."""

    name: str
    carries_priority: bool
    generate: Callable[[GenerationRequest], Awaitable[GenerationResult]]
    stream: Callable[[GenerationRequest], AsyncGenerator[Event, None]]
    cancel: Callable[[str], Awaitable[bool]]

    @classmethod
    def over_http(cls, client: AsyncClient) -> Door:
        return cls("over HTTP", False, client.generate, client.stream, client.cancel)

    @classmethod
    def by_handle(cls, client: HandleClient) -> Door:
        return cls("by handle", True, client.agenerate, client.astream, client.acancel)


class Clients:
    """All clients of one run.

    Args:
        url: of the service.
        asked: the scenes of which they choose.
        references: the pictures of each scene by a single worker.
        seed: of what is asked for.

    Attributes:
        faults: each request that was lost, and each picture that was another one.
    """

    def __init__(
        self, url: str, asked: list[Scene], references: dict[str, list[Image.Image]], seed: int
    ) -> None:
        self._url = url
        self._references = references
        self._seed = seed
        self._scenes = asked
        self._ends: Counter[str] = Counter()
        self._gangs: Counter[str] = Counter()
        self._seconds: dict[str, list[float]] = {}
        self._slowest = 0.0, ""
        self.faults: list[str] = []

    async def ask_on(self, number: int, seconds: float) -> None:
        """One client's requests, until the time is up."""
        draw = random.Random(f"{self._seed} {number}")
        end = time.monotonic() + seconds
        async with AsyncClient(self._url) as http:
            doors = Door.over_http(http), Door.by_handle(HandleClient.connect())
            while time.monotonic() < end:
                await self.ask(draw.choices(doors, (1 - BY_HANDLE, BY_HANDLE))[0], draw)

    async def ask(self, door: Door, draw: random.Random) -> None:
        """One request, asked again where the service broke off or has no room."""
        scene = draw.choice(self._scenes)
        manner = draw.choices(list(MANNERS), list(MANNERS.values()))[0]
        began, last = time.monotonic(), ""
        for _ in range(TRIES):
            try:
                end = await manner(door, scene, draw)
                break
            except QueueFull as error:
                self._ends["asked again, as the queue was full"] += 1
                last = str(error)
                await asyncio.sleep(error.retry_after_s)
            except ConnectionError as error:
                self._ends["asked again, as the service broke off"] += 1
                last = str(error)
                await asyncio.sleep(PAUSE_S)
            except (DistrirayError, Lost, TimeoutError) as error:
                end = self._lose(f"{type(error).__name__}: {error}", door, scene)
                break
        else:
            end = self._lose(f"{TRIES} times, the last {last}", door, scene)
        seconds = time.monotonic() - began
        if isinstance(end, GenerationResult):
            end = self._take(scene, end, seconds)
        self._ends[end] += 1
        self._seconds.setdefault(f"{end}, {door.name}", []).append(seconds)

    def _take(self, scene: Scene, result: GenerationResult, seconds: float) -> str:
        """Hold a result's pictures against the references'; how the request ended."""
        told = f"{scene.name}, after {seconds:.1f} s: {result.summary()}"
        for fault in scene.faults(result.images, self._references[scene.name]):
            self._fail(f"{fault}: {told}")
        self._slowest = max(self._slowest, (seconds, told))
        self._gangs[", then ".join(str(len(segment.workers)) for segment in result.segments[:4])] += 1
        return "finished after a gang broke" if result.repairs else "finished"

    def _lose(self, why: str, door: Door, scene: Scene) -> str:
        self._fail(f"lost: {scene.name}, {door.name}: {why}")
        return "lost"

    def _fail(self, fault: str) -> None:
        self.faults.append(fault)
        print(time.strftime("%H:%M:%S"), fault, flush=True)

    def tell(self, report: Report) -> None:
        """Add what came of all requests."""
        for end, count in sorted(self._ends.items()):
            report.add(end, str(count), *NO_SECONDS)
        for end, seconds in sorted(self._seconds.items()):
            figures = median(seconds), quantiles(2 * seconds, n=20, method="inclusive")[-1], max(seconds)
            report.add(end, str(len(seconds)), *(f"{figure:.2f}" for figure in figures))
        for gangs, count in self._gangs.most_common(8):
            report.add(f"pictures by gangs of {gangs}", str(count), *NO_SECONDS)
        report.add("lost, or another picture", str(len(self.faults)), *NO_SECONDS)
        print("the slowest picture:", self._slowest[1])

    def compare(self, again: dict[str, list[Image.Image]], report: Report) -> None:
        """Hold what single workers draw at the end against what they drew before."""
        pairs = [
            (name, one, other)
            for name, pictures in again.items()
            for one, other in zip(pictures, self._references[name], strict=True)
        ]
        others = [name for name, one, other in pairs if one.tobytes() != other.tobytes()]
        for name in others:
            self._fail(f"{name}, drawn again at the end by a single worker, is another picture")
        same = str(len(pairs) - len(others))
        report.add("drawn again at the end by single workers", str(len(pairs)), *NO_SECONDS)
        report.add("drawn again, the same bytes", same, *NO_SECONDS)


async def generate(door: Door, scene: Scene, draw: random.Random) -> End:
    return await door.generate(_request(door, scene, draw))


async def stream(door: Door, scene: Scene, draw: random.Random) -> End:
    if scene.images > 1:  # a stream is of one
        return await generate(door, scene, draw)
    result = None
    async for event in door.stream(_request(door, scene, draw, previews=2)):
        if isinstance(event, Finished):
            result = event.result
    if result is None:
        raise Lost("a stream ended without its result")
    return result


async def leave(door: Door, scene: Scene, draw: random.Random) -> End:
    task = asyncio.ensure_future(door.generate(_request(door, scene, draw)))
    done, _ = await asyncio.wait([task], timeout=draw.uniform(*LEAVES_AFTER_S))
    if done:
        return task.result()
    task.cancel()
    with suppress(asyncio.CancelledError, ConnectionError):
        await task
    return "left"


async def leave_a_stream(door: Door, scene: Scene, draw: random.Random) -> End:
    if scene.images > 1:
        return await leave(door, scene, draw)
    end = time.monotonic() + draw.uniform(*LEAVES_AFTER_S)
    events = door.stream(_request(door, scene, draw))
    async for event in events:
        if isinstance(event, Finished):
            return event.result
        if time.monotonic() > end:
            break
    await events.aclose()
    return "left"


async def cancel(door: Door, scene: Scene, draw: random.Random) -> End:
    if scene.images > 1:
        return await leave(door, scene, draw)
    after, cancelling = draw.uniform(*LEAVES_AFTER_S), None
    try:
        async for event in door.stream(_request(door, scene, draw)):
            if isinstance(event, Finished):
                return event.result
            cancelling = cancelling or asyncio.create_task(_cancel(door, event.request_id, after))
    except GenerationCancelled:
        return "cancelled by id"
    finally:
        if cancelling is not None:
            cancelling.cancel()
            await asyncio.gather(cancelling, return_exceptions=True)
    raise Lost("a stream ended without its result")


async def _cancel(door: Door, request_id: str, after: float) -> None:
    await asyncio.sleep(after)
    with suppress(ConnectionError):
        await door.cancel(request_id)


async def in_time(door: Door, scene: Scene, draw: random.Random) -> End:
    request = _request(door, scene, draw, deadline_s=draw.uniform(*DEADLINE_S))
    try:
        return await door.generate(request)
    except DeadlineUnmet:
        return "refused, as its deadline cannot be met"


def _request(door: Door, scene: Scene, draw: random.Random, **others: object) -> GenerationRequest:
    if door.carries_priority:
        others["priority"] = draw.choice((-2, 0, 0, 3))
    return scene.request(**others)


MANNERS = {generate: 8, stream: 5, leave: 3, leave_a_stream: 2, cancel: 2, in_time: 2}
"""How a client asks, and how often in proportion."""
