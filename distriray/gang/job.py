"""One accepted request on its way through a host."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Collection, Iterable

from ..requests import GenerationRequest, GenerationResult, Segment, Timings
from ..routing.policy import RequestView
from .events import Event
from .messages import Outcome
from .remote import WorkerId


class Job:
    """A request between submission and its one end. Times are on the monotonic clock.

    Attributes:
        step: steps that are done of `num_steps`, as far as the host has heard (second order
            schedulers take more steps than were asked for).
        workers: the gang it holds now, rank 0 first; None while it waits.
        number: of all requests that the host accepted, this one's.
        held: the processes that hold a state of it, and the step that each has; they lose it by dying, and
            what they have changes with every segment that they come back from.
        serial: of its running segment.
        predicted_s: seconds to the result, as predicted when it was accepted.
        breaking: its gang broke and is being cleared up; no policy sees it meanwhile.
        failures: why workers failed under it, each once a worker.
        previews: pictures shown so far, the last one of step `shown`.
    """

    def __init__(self, request: GenerationRequest, max_gang: int, number: int) -> None:
        self.request, self.number = request, number
        self.max_gang = max_gang
        self.arrival = time.monotonic()
        self.ended: asyncio.Future[GenerationResult] = asyncio.get_running_loop().create_future()
        self.ended.add_done_callback(_retrieve)
        self.predicted_s = 0.0
        self.step, self.num_steps = 0, request.num_inference_steps
        self.prepared = False
        self.workers: tuple[int, ...] | None = None
        self.held: dict[WorkerId, int] = {}
        self.serial = -1
        self.yielding = False
        self.cancelled = False
        self.breaking = False
        self.breaks = 0
        self.failures: list[str] = []
        self.segments: list[Segment] = []
        self.previews = 0
        self.shown = 0
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self._started: float | None = None
        self._sent_at = 0.0
        self._prepare_s = self._denoise_s = self._decode_s = 0.0

    @property
    def deadline(self) -> float | None:
        return None if self.request.deadline_s is None else self.arrival + self.request.deadline_s

    @property
    def decoding(self) -> bool:
        """It holds workers, of which one is at work, and makes no more steps."""
        return self.workers is not None and self.step >= self.num_steps

    @property
    def holders(self) -> set[WorkerId]:
        """The processes that hold its state at `step`; meaningful while it waits."""
        return {worker for worker, step in self.held.items() if step == self.step}

    def rewind(self) -> None:
        """It waits at the last step that anybody holds, or from the beginning."""
        self.step, self.prepared = max(self.held.values(), default=0), bool(self.held)

    def view(self) -> RequestView:
        """What a policy sees of it."""
        request = self.request
        assert request.height is not None and request.width is not None
        return RequestView(
            id=request.id,
            height=request.height,
            width=request.width,
            batch=request.num_images,
            steps_total=self.num_steps,
            steps_done=self.step,
            arrival_s=self.arrival,
            deadline_s=self.deadline,
            priority=request.priority,
            gang_size=None if request.gang_size == "auto" else request.gang_size,
            max_gang=self.max_gang,
            workers=self.workers,
            prepared=self.prepared,
            pinned=self.decoding,
        )

    def tell(self, event: Event) -> None:
        """Let whoever streams it hear `event`."""
        self.events.put_nowait(event)

    def begin(self, workers: tuple[int, ...], serial: int) -> None:
        """A gang takes it up."""
        self._started = self._started or time.monotonic()
        self.workers, self.serial, self.yielding = workers, serial, False
        self._sent_at = time.time()

    def account(self, outcomes: Collection[Outcome], first: int, seconds: float) -> None:
        """Add a segment that began at step `first`; `outcomes` are its survivors', lowest rank first."""
        assert self.workers is not None
        last = max(outcome.step for outcome in outcomes)
        self.segments.append(
            Segment(
                workers=self.workers,
                first_step=first,
                last_step=last,
                seconds=seconds,
                sent_at=self._sent_at,
                formed_at=max(outcome.formed_at for outcome in outcomes),
                left_at=max(outcome.left_at for outcome in outcomes),
                fresh_step_s=_mean(step for outcome in outcomes for step in outcome.fresh_s),
                stale_step_s=_mean(step for outcome in outcomes for step in outcome.stale_s),
            )
        )
        first_rank = next(iter(outcomes))
        self._prepare_s += first_rank.prepare_s
        self._denoise_s += sum(first_rank.fresh_s) + sum(first_rank.stale_s)
        self._decode_s += first_rank.decode_s

    def result(self, model: str, outcome: Outcome) -> GenerationResult:
        """What its owner gets."""
        request, now = self.request, time.monotonic()
        assert request.height is not None and request.width is not None
        assert outcome.images is not None and self._started is not None
        return GenerationResult(
            id=request.id,
            model=model,
            height=request.height,
            width=request.width,
            seeds=request.seeds,
            timings=Timings(
                queued_s=self._started - self.arrival,
                prepare_s=self._prepare_s,
                denoise_s=self._denoise_s,
                decode_s=self._decode_s,
                total_s=now - self.arrival,
            ),
            segments=self.segments,
            repairs=self.breaks,
            images=outcome.images,
        )


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.fmean(known) if known else None


def _retrieve(ended: asyncio.Future[GenerationResult]) -> None:
    """Nobody need wait for a request to end; then its error is no fault of the program."""
    if not ended.cancelled():
        ended.exception()
