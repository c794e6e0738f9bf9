"""What the endurance run would find: requests that are lost, other pictures, and memory that grows."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.endurance import clients
from bench.endurance.clients import Clients, Door
from bench.endurance.resources import COLUMNS, Life, Look, Resources
from bench.endurance.scenes import ALIKE_COLOURS, Scene, scenes
from bench.report import Report
from distriray import GenerationRequest
from distriray.errors import DeadlineUnmet, GangBroken, GenerationCancelled, QueueFull
from distriray.events import Event, Finished
from distriray.results import GenerationResult, Segment, Timings

SEGMENT = Segment(
    workers=(0,), first_step=0, last_step=8, seconds=1.0, sent_at=0.0, formed_at=0.0, left_at=1.0
)
GREY = Image.new("RGB", (16, 16), (100, 100, 100))


def brighter(by: int) -> Image.Image:
    return Image.fromarray(np.asarray(GREY) + np.uint8(by))


def result(request: GenerationRequest, picture: Image.Image) -> GenerationResult:
    return GenerationResult(
        id=request.id,
        model="m",
        height=16,
        width=16,
        seeds=[0],
        timings=Timings(queued_s=0, prepare_s=0, denoise_s=0, decode_s=0, total_s=0),
        segments=[SEGMENT],
        images=[picture] * request.num_images,
    )


def door(answer: Callable[[GenerationRequest], Image.Image]) -> Door:
    """A service that answers so."""

    async def generate(request: GenerationRequest) -> GenerationResult:
        return result(request, answer(request))

    async def stream(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        yield Finished(request.id, result(request, answer(request)))

    async def cancel(request_id: str) -> bool:
        return False

    return Door("by the test", True, generate, stream, cancel)


def asked(answer: Callable[[GenerationRequest], Image.Image], times: int = 40) -> Clients:
    """Clients that have asked a service which answers so, in every manner."""
    references = {scene.name: [GREY] * scene.images for scene in scenes(4)}
    asking, draw = Clients("http://nobody", scenes(4), references, seed=0), random.Random(0)

    async def ask() -> None:
        for _ in range(times):
            await asking.ask(door(answer), draw)

    asyncio.run(ask())
    return asking


def rows(
    tell: Callable[[Report], None], columns: tuple[str, ...] = clients.COLUMNS
) -> dict[str, tuple[str, ...]]:
    report = Report("t", columns, seed=0, settings={})
    tell(report)
    return {what: cells for what, *cells in report.rows}


def raising(*errors: Exception) -> Callable[[GenerationRequest], Image.Image]:
    """Raises these, one a call, and then draws."""
    left = list(errors)

    def answer(request: GenerationRequest) -> Image.Image:
        if left:
            raise left.pop(0)
        return GREY

    return answer


@pytest.mark.parametrize(
    ("exact", "off", "is_another"),
    [(True, ALIKE_COLOURS, False), (True, ALIKE_COLOURS + 1, True), (False, 10, False), (False, 20, True)],
)
def test_pictures_are_held_to_how_near_they_must_be(exact: bool, off: int, is_another: bool) -> None:
    scene = Scene("grey", {"prompt": "x"}, exact)
    assert bool(scene.faults([brighter(off)], [GREY])) is is_another
    assert not scene.faults([GREY], [GREY])


def test_missing_pictures_and_other_sizes_are_faults() -> None:
    scene = Scene("grey", {"prompt": "x"})
    assert scene.faults([GREY], [GREY, GREY]) == ["1 pictures in place of 2"]
    assert scene.faults([GREY.resize((8, 16))], [GREY]) == ["(8, 16) in place of (16, 16)"]


def test_a_service_without_a_fault_has_none() -> None:
    asking = asked(lambda request: GREY)
    assert not asking.faults and rows(asking.tell)["lost, or another picture"][0] == "0"
    assert int(rows(asking.tell)["finished"][0]) > 30


def test_every_other_picture_is_found_in_every_manner() -> None:
    assert len(asked(lambda request: brighter(50)).faults) >= 40


@pytest.mark.parametrize(
    "error", [GangBroken("x"), TimeoutError("x"), GenerationCancelled("x"), DeadlineUnmet("x")]
)
def test_errors_that_nobody_asked_for_are_losses(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "MANNERS", {clients.generate: 1})
    asking = asked(raising(error), times=2)
    (fault,) = asking.faults
    assert type(error).__name__ in fault
    assert rows(asking.tell)["lost"][0] == "1" and rows(asking.tell)["finished"][0] == "1"


def test_what_breaks_off_or_is_full_is_asked_again_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "PAUSE_S", 0)
    asking = asked(raising(ConnectionError("x"), QueueFull("x", 0), ConnectionError("x")), times=1)
    told = rows(asking.tell)
    assert told["asked again, as the service broke off"][0] == "2"
    assert told["asked again, as the queue was full"][0] == "1"
    assert not asking.faults
    asking = asked(raising(*[ConnectionError("gone")] * clients.TRIES), times=1)
    assert "gone" in asking.faults[0]


def test_what_a_single_worker_draws_otherwise_at_the_end_is_a_fault() -> None:
    asking = asked(lambda request: GREY, times=0)
    again = {scene.name: [GREY] * scene.images for scene in scenes(4)}
    assert rows(lambda report: asking.compare(again, report)) and not asking.faults
    again["small"] = [brighter(1)]
    rows(lambda report: asking.compare(again, report))
    assert len(asking.faults) == 1 and "small" in asking.faults[0]


def test_growth_is_that_of_the_second_half() -> None:
    def memory(hour: float) -> float:
        return 500 + 100 * max(0.0, hour - 1)

    life = Life(0.0, "worker", [Look(60.0 * i, memory(i / 60), 10, 5) for i in range(2 * 60)])
    assert life.figures() == ("116", "500", "502", "598", "+100", "10", "5")


def test_this_process_is_looked_at_and_told() -> None:
    resources = Resources()
    for _ in range(2):
        resources.look()
    held = dict(zip(COLUMNS[1:], rows(resources.tell, COLUMNS)["clients"], strict=True))
    assert held["of"] == "1" and int(held["MB at last"]) > 10 and int(held["threads"]) > 0


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 8])
def test_scenes_are_requests_that_are_told_apart_and_fit_the_hosts(workers: int) -> None:
    all_scenes = scenes(workers)
    assert len({scene.name for scene in all_scenes}) == len(all_scenes)
    requests: list[Any] = [scene.request() for scene in all_scenes]
    assert len({request.model_dump_json(exclude={"id", "image"}) for request in requests}) == len(requests)
    sizes = {request.gang_size for request in requests} - {"auto"}
    assert max(sizes) == min(4, 2 ** (workers.bit_length() - 1))
