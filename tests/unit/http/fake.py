"""A service that draws grey pictures, as slowly as a test asks, and remembers what became of them.

It checks requests as a router does, with the functions that a router calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from PIL import Image

from distriray.denoise.pipelines.terms import Terms
from distriray.errors import DistrirayError
from distriray.events import Event, Finished, Preview, Queued, Started, Step
from distriray.gang.admission import check_gang_size
from distriray.limits import Limits
from distriray.requests import GenerationRequest
from distriray.results import GenerationResult, Segment, Timings
from distriray.service import Fleet, FleetNews, ModelCard, PoolReport
from distriray.status import HostStatus, PredictionStatus, WorkerStatus
from distriray.steps import StepCount

LIMITS = Limits(max_side=256, max_pixels=256 * 256, max_steps=50, max_images=4, max_previews=3)
LACKS = {"prompt_3": "this model has no third text encoder"}
CARDS = [
    ModelCard(id="builtin:landscapes", created=1, default_size=(64, 96), limits=LIMITS, gang_sizes=(1, 2)),
    ModelCard(id="some/other", created=2, default_size=(128, 128), size_unit=16, limits=LIMITS, lacks=LACKS),
]


@dataclass
class FakeService:
    """`refusal` is raised at once, `failure` after the first preview; `pace_s` is slept for each step.

    Before all that, and before it says a word of a stream, `wakes_s` is slept, as where a first host starts.
    """

    refusal: Exception | None = None
    failure: Exception | None = None
    illness: DistrirayError | None = None
    pace_s: float = 0.0
    wakes_s: float = 0.0
    asked: list[GenerationRequest] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    patience: list[float | None] = field(default_factory=list)
    news: list[FleetNews] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    looks: int = 0

    async def generate(self, request: GenerationRequest, give_up_s: float | None = None) -> GenerationResult:
        async for event in self.stream(request, give_up_s):
            if isinstance(event, Finished):
                return event.result
        raise AssertionError("a stream ends with Finished")

    async def stream(
        self, request: GenerationRequest, give_up_s: float | None = None
    ) -> AsyncGenerator[Event, None]:
        card = next(card for card in CARDS if card.id == request.model)
        card.limits.check(request)
        request.check_size(card.size_unit)
        card.limits.check(request.settled(*card.default_size))
        check_gang_size(request, card.gang_sizes)
        steps = Terms().settle(request, card.default_size, card.size_unit).num_steps(StepCount())
        self.asked.append(request)
        self.patience.append(give_up_s)
        try:
            await asyncio.sleep(self.wakes_s)
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        if self.refusal is not None:
            raise self.refusal
        request = Terms().settle(request, card.default_size, card.size_unit)
        outcome = "cancelled"
        try:
            yield Queued(request.id, 0, 0.0)
            yield Started(request.id, (0, 1))
            for step in range(1, steps + 1):
                await asyncio.sleep(self.pace_s)
                yield Step(request.id, step, steps, 2, 0.1)
                if step in request.preview_steps(steps):
                    index = sorted(request.preview_steps(steps)).index(step)
                    yield Preview(request.id, step, index, Image.new("RGB", (8, 12), (step, 0, 0)))
                    if self.failure is not None:
                        raise self.failure
            outcome = "finished"
            yield Finished(request.id, result_of(request))
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # a real service tells its host, and must get to it
            raise
        finally:
            self.ended.append(outcome)

    async def cancel(self, request_id: str) -> bool:
        self.cancelled.append(request_id)
        return any(request.id == request_id for request in self.asked[len(self.ended) :])

    def models(self) -> list[ModelCard]:
        return CARDS

    async def fleet(self) -> Fleet:
        worker = WorkerStatus(index=0, healthy=True, pid=1, device="cpu", load_s=1.0, memory=1, request=None)
        host = HostStatus(
            model=CARDS[0].id,
            device="cpu",
            healthy=True,
            gang_sizes=(1, 2),
            default_size=(64, 96),
            workers=[worker],
            free_workers=1,
            running=[],
            waiting=[],
            max_queue=8,
            backlog_s=0.0,
            repairs=[],
            outcomes={},
            steps={},
            regroupings=0,
            predictions=PredictionStatus(count=0),
        )
        pool = PoolReport(model=CARDS[0].id, predicted_wait_s=0.5, hosts={"a": host})
        return Fleet(pools={"pool": pool})

    async def watch(self) -> AsyncGenerator[FleetNews, None]:
        for news in self.news:
            yield news
            await asyncio.sleep(self.pace_s)

    async def check_health(self) -> None:
        self.looks += 1
        if self.illness is not None:
            raise self.illness


def result_of(request: GenerationRequest) -> GenerationResult:
    """A grey picture for each seed."""
    assert request.height is not None and request.width is not None and request.model is not None
    steps = Terms().settle(request, (request.height, request.width), 8).num_steps(StepCount())
    segment = Segment(
        workers=(0, 1), first_step=0, last_step=steps, seconds=1.0, sent_at=0, formed_at=0, left_at=1
    )
    return GenerationResult(
        id=request.id,
        model=request.model,
        height=request.height,
        width=request.width,
        seeds=request.seeds,
        timings=Timings(queued_s=0.0, prepare_s=0.1, denoise_s=1.0, decode_s=0.1, total_s=1.25),
        segments=[segment],
        warnings=[
            f"{name} is long"
            for name in ("prompt", "negative_prompt")
            if "long" in (getattr(request, name) or "")
        ],
        images=[
            Image.new("RGB", (request.width, request.height), (i, i, i)) for i in range(request.num_images)
        ],
    )
