"""An accepted request on its way through a host."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from enum import StrEnum

from PIL import Image

from distriray.adapters import AdapterSpec
from distriray.events import Event, Preview, Regrouped, Started, Step
from distriray.gang.admission import Admitted
from distriray.gang.messages import Progress, RankResult, WorkerId
from distriray.gang.segment_result import SegmentResult
from distriray.results import GenerationResult, Segment, Timings
from distriray.routing.policy import RequestView
from distriray.status import RequestStatus


class JobState(StrEnum):
    """State of a request on its host."""

    WAITING = "waiting"  # for workers
    RUNNING = "running"  # a gang makes its steps
    YIELDING = "yielding"  # its gang was told to leave after the step it is in
    DECODING = "decoding"  # all steps are done, the gang makes the picture
    BREAKING = "breaking"  # its gang lost a worker and has not come back yet
    ENDED = "ended"


TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    JobState.WAITING: frozenset({JobState.RUNNING, JobState.ENDED}),
    JobState.RUNNING: frozenset(JobState) - {JobState.RUNNING},
    JobState.YIELDING: frozenset({JobState.DECODING, JobState.BREAKING, JobState.WAITING, JobState.ENDED}),
    JobState.DECODING: frozenset({JobState.BREAKING, JobState.WAITING, JobState.ENDED}),
    JobState.BREAKING: frozenset({JobState.WAITING, JobState.ENDED}),
    JobState.ENDED: frozenset(),
}
"""Every change of state that can be."""


class Job:
    """A request between submission and its one end. Times are on the monotonic clock.

    Its verbs change it, and nobody else does.

    Attributes:
        request: without its pictures.
        pictures: by field, for whoever prepares it; nobody has them any more when it has ended.
        number: of all requests that the host accepted, this one's.
        adapters: those that it names, as they were known when it was accepted.
        step: steps that are done of `num_steps`, as far as the host has heard (second order
            schedulers take more steps than were asked for).
        workers: the gang that it has, rank 0 first; None while it waits.
        serial: of its last segment.
        cancelled: its owner wants it no more.
        held: the processes that hold a state of it, and the step that each has. They lose it by dying, and
            what they hold changes with every segment that they come back from.
        predicted_s: seconds to the result, as predicted when it was accepted.
        breaks: gangs that were interrupted under it.
        previews: pictures shown so far, the last one of step `shown`.
        ended: its result or its error.
    """

    def __init__(self, admitted: Admitted, number: int, adapters: tuple[AdapterSpec, ...] = ()) -> None:
        self.request, self.number = admitted.request.without_pictures(), number
        self.adapters, self.pictures = adapters, admitted.request.pictures
        self._admitted = admitted._replace(request=self.request)
        self.arrival = time.monotonic()
        self.state = JobState.WAITING
        self.ended: asyncio.Future[GenerationResult] = asyncio.get_running_loop().create_future()
        self.ended.add_done_callback(_retrieve)
        self.predicted_s = 0.0
        self.step, self.num_steps = 0, admitted.num_steps
        self.workers: tuple[int, ...] | None = None
        self.held: dict[WorkerId, int] = {}
        self.serial = -1
        self.cancelled = False
        self.breaks = 0
        self.segments: list[Segment] = []
        self.previews = 0
        self.shown = 0
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self._first_step = 0
        self._failures: list[str] = []
        self._started: float | None = None
        self._sent_at = self._sent = 0.0
        self._adapters_s = self._prepare_s = self._denoise_s = self._decode_s = 0.0

    @property
    def deadline(self) -> float | None:
        """When it is due."""
        return None if self.request.deadline_s is None else self.arrival + self.request.deadline_s

    @property
    def decoding(self) -> bool:
        """The job still has its workers, but no steps left."""
        return self.state is JobState.DECODING

    @property
    def breaking(self) -> bool:
        """Its gang is being cleared up; no policy sees it until that is over."""
        return self.state is JobState.BREAKING

    @property
    def prepared(self) -> bool:
        """Somebody has its prompt encoded."""
        return bool(self.held) or self.step > 0

    @property
    def holders(self) -> set[WorkerId]:
        """The processes that hold its state at `step`; meaningful while it waits."""
        return {worker for worker, step in self.held.items() if step == self.step}

    @property
    def hopeless(self) -> bool:
        """Two workers failed under it in the same way: it is not their fault."""
        return len(set(self._failures)) < len(self._failures)

    def view(self) -> RequestView:
        """The policy's view of the job."""
        return replace(
            self._admitted.view(self.arrival, self.deadline),
            steps_total=self.num_steps,
            steps_done=self.step,
            workers=self.workers,
            prepared=self.prepared,
            pinned=self.decoding,
        )

    def status(self, now_s: float) -> RequestStatus:
        """The operator's view of the job."""
        return RequestStatus(
            id=self.request.id,
            step=self.step,
            num_steps=self.num_steps,
            waited_s=now_s - self.arrival,
            workers=self.workers,
        )

    def tell(self, event: Event) -> None:
        """Let the client that streams it hear `event`."""
        self.events.put_nowait(event)

    def start(self, workers: tuple[int, ...], serial: int) -> None:
        """A gang takes it up."""
        self._become(JobState.RUNNING)
        self.workers, self.serial = workers, serial
        self._first_step, self._sent_at, self._sent = self.step, time.time(), time.monotonic()
        if self.step >= self.num_steps:
            self._become(JobState.DECODING)
        if self._started is None:
            self._started = self._sent
            self.tell(Started(self.request.id, workers))
        else:
            self.tell(Regrouped(self.request.id, workers, self.step))

    def yield_(self) -> bool:
        """Its workers are wanted elsewhere; whether it has to be told."""
        if self.state is not JobState.RUNNING or self.cancelled:
            return False
        self._become(JobState.YIELDING)
        return True

    def cancel(self) -> bool:
        """Its owner wants it no more; whether that is new."""
        if self.cancelled or self.state is JobState.ENDED:
            return False
        self.cancelled = True
        return True

    def progress(self, progress: Progress) -> None:
        """Its gang has gone on."""
        self.step, self.num_steps = progress.step, progress.num_steps
        if self.step >= self.num_steps and self.state in (JobState.RUNNING, JobState.YIELDING):
            self._become(JobState.DECODING)
        for step, image in progress.previews:
            self._show(step, image)
        seconds, size = time.monotonic() - self.arrival, len(self.workers or ())
        self.tell(Step(self.request.id, self.step, self.num_steps, size, seconds))

    def break_off(self) -> None:
        """Its gang has lost a worker."""
        if self.state is not JobState.BREAKING:
            self._become(JobState.BREAKING)

    def come_back(self, result: SegmentResult, held: Mapping[WorkerId, int]) -> None:
        """Its gang has left it, for now or for good; `held` is the part of `result.held` that is still so."""
        if worked := result.worked:
            self._account(worked)
            for step, image in worked[0].previews:
                self._show(step, image)
        self._failures += result.failures
        if result.mute is not None:
            self.held.pop(result.mute, None)
        self.held.update(held)
        self.workers = None
        self._become(JobState.WAITING)
        self._rewind()

    def lose(self, worker: WorkerId) -> None:
        """A process died with what it held."""
        self.held.pop(worker, None)
        if self.state is JobState.WAITING:
            self._rewind()

    def end(self, end: GenerationResult | BaseException) -> None:
        """It is over."""
        self._become(JobState.ENDED)
        self.pictures = {}
        if isinstance(end, GenerationResult):
            self.ended.set_result(end)
        else:
            self.ended.set_exception(end)

    def result(self, model: str, rank: RankResult) -> GenerationResult:
        """The result that the job's owner gets."""
        request, now = self.request, time.monotonic()
        assert request.height is not None and request.width is not None
        assert rank.images is not None and self._started is not None
        return GenerationResult(
            id=request.id,
            model=model,
            height=request.height,
            width=request.width,
            seeds=request.seeds,
            timings=Timings(
                queued_s=self._started - self.arrival,
                adapters_s=self._adapters_s,
                prepare_s=self._prepare_s,
                denoise_s=self._denoise_s,
                decode_s=self._decode_s,
                total_s=now - self.arrival,
            ),
            segments=self.segments,
            repairs=self.breaks,
            warnings=list(rank.warnings),
            images=rank.images,
        )

    def _become(self, state: JobState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"request {self.request.id} is {self.state} and cannot become {state}")
        self.state = state

    def _rewind(self) -> None:
        """Return to the last step that anybody holds, or to the beginning."""
        self.step = max(self.held.values(), default=0)

    def _account(self, ranks: list[RankResult]) -> None:
        """Add the segment that has ended; `ranks` took part in it, lowest first."""
        assert self.workers is not None
        self.segments.append(
            Segment(
                workers=self.workers,
                first_step=self._first_step,
                last_step=max(rank.step for rank in ranks),
                seconds=time.monotonic() - self._sent,
                sent_at=self._sent_at,
                formed_at=max(rank.formed_at for rank in ranks),
                left_at=max(rank.left_at for rank in ranks),
                fresh_step_s=_mean(step for rank in ranks for step in rank.fresh_s),
                stale_step_s=_mean(step for rank in ranks for step in rank.stale_s),
                exchange=ranks[0].exchange,
            )
        )
        first = ranks[0]
        self._adapters_s += first.adapters_s
        self._prepare_s += first.prepare_s
        self._denoise_s += sum(first.fresh_s) + sum(first.stale_s)
        self._decode_s += first.decode_s

    def _show(self, step: int, image: Image.Image) -> None:
        if step > self.shown:
            self.tell(Preview(self.request.id, step, self.previews, image))
            self.shown, self.previews = step, self.previews + 1


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.fmean(known) if known else None


def _retrieve(ended: asyncio.Future[GenerationResult]) -> None:
    """Nobody need wait for a request to end; then its error is no fault of the program."""
    if not ended.cancelled():
        ended.exception()
