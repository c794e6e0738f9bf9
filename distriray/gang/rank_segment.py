"""A segment on a worker's side: one rank gets ready, steps, and says how it ended. No Ray."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Mapping

import torch
from PIL import Image

from distriray.collective import Communicator
from distriray.collective.all_gather import numbers_of_all
from distriray.denoise import Denoiser, DenoiseState
from distriray.errors import DistrirayError, GangBroken, GenerationCancelled, NotFinite, OutOfMemory
from distriray.gang.devices import DEVICES
from distriray.gang.mailbox import Mailbox
from distriray.gang.messages import RankResult, SegmentEnd, SegmentOrder
from distriray.parallel.engine import Engine
from distriray.parallel.room import is_out_of_memory
from distriray.parallel.stopwatch import Stopwatch
from distriray.picture import Picture
from distriray.status import AdapterStatus

log = logging.getLogger("ray.serve.distriray.worker")


class RankSegment:
    """One rank's part of a segment, from its order to its result. It is run once.

    Args:
        communicator: to the other ranks, on `device`.
        denoiser, engine: of one pipeline on `device`.
        states: those that this worker holds, by job; this segment's is left there.
        mailbox: of the worker, in which this segment is the one that runs.
    """

    def __init__(
        self,
        order: SegmentOrder,
        communicator: Communicator,
        device: torch.device,
        denoiser: Denoiser,
        engine: Engine,
        states: dict[int, DenoiseState],
        mailbox: Mailbox,
    ) -> None:
        self._order, self._communicator, self._device = order, communicator, device
        self._denoiser, self._engine = denoiser, engine
        self._states, self._mailbox = states, mailbox
        self._state: DenoiseState | None = None  # once this rank was ready
        self._begun = False  # once all were
        self._awaited = False  # once this rank is to say so, until no other needs it any more
        self._adapters_s = self._prepare_s = self._decode_s = 0.0
        self._fresh_s: list[float] = []
        self._stale_s: list[float] = []
        self._launched: tuple[Stopwatch, bool] | None = None  # the last step, and whether it is synchronous
        self._waited: float | None = None
        self._images: list[Image.Image] | None = None
        self._formed_at = self._left_at = 0.0

    def run(self, blob: bytes | None, pictures: Mapping[str, Picture]) -> RankResult:
        """All of it, as `SegmentRunner.run`."""
        communicator = self._communicator
        sent, error, cause = communicator.bytes_sent, None, ""
        try:
            end = self._work(blob, pictures)
        except Exception as raised:
            end, error, cause = self._judge(raised)
            if self._awaited and not _alike(raised) and communicator.world_size > 1:
                communicator.abort()  # else the others wait for this rank until their time is up
        state = self._state
        return RankResult(
            end=end,
            step=self._order.step if state is None else state.step,
            adapters_s=self._adapters_s,
            prepare_s=self._prepare_s,
            fresh_s=tuple(self._fresh_s),
            stale_s=tuple(self._stale_s),
            decode_s=self._decode_s,
            bytes_sent=communicator.bytes_sent - sent,
            previews=self._mailbox.previews,
            images=self._images,
            error=error,
            cause=cause,
            broken=communicator.broken,
            formed_at=self._formed_at,
            left_at=self._left_at,
            exchange=self._engine.exchange,
            waited=self._waited,
            warnings=() if state is None else state.warnings,
            adapters=self._adapters(),
        )

    def _work(self, blob: bytes | None, pictures: Mapping[str, Picture]) -> SegmentEnd:
        order, communicator = self._order, self._communicator
        began, adapters = time.perf_counter(), self._denoiser.adapters
        switching_s = adapters.seconds
        try:
            self._engine.join(communicator, order.parallel)  # requests have generators: no state to share
            adapters.learn(order.adapters)
            state = self._take(blob, pictures)
            self._denoiser.adapt(state)
            self._state = state
        except Exception:
            try:
                numbers_of_all(communicator, False)
            except GangBroken:
                pass
            except Exception:  # without memory for a byte, say
                communicator.abort()
            raise
        self._adapters_s = adapters.seconds - switching_s
        self._prepare_s = time.perf_counter() - began - self._adapters_s if order.step == 0 else 0.0
        self._formed_at = self._left_at = time.time() - self._prepare_s - self._adapters_s
        self._awaited = True
        if not all(numbers_of_all(communicator, True)):
            return SegmentEnd.NOT_BEGUN
        self._begun = True
        try:
            end = self._steps(state)
        finally:
            self._left_at = time.time()
        if end is SegmentEnd.DONE:
            self._awaited = self._engine.decodes_together  # what precedes the last gather has arrived with it
            began = time.perf_counter()
            self._images = self._decode(state)
            self._decode_s = time.perf_counter() - began
        return end

    def _take(self, blob: bytes | None, pictures: Mapping[str, Picture]) -> DenoiseState:
        """The state that this segment goes on with, or begins with: from now on this worker holds it."""
        order = self._order
        state = self._states.get(order.job)
        if blob is not None:  # whatever is here: it may have come to this step another way than the others'
            state = DenoiseState.from_bytes(blob).to(self._device)
        elif state is not None and state.step == order.step:
            return state
        elif order.step == 0:
            state = self._denoiser.prepare(order.request.with_pictures(pictures))
        else:
            raise LookupError(
                f"request {order.request.id} is to go on at step {order.step}, but its state is not here"
            )
        self._states[order.job] = state
        return state

    def _steps(self, state: DenoiseState) -> SegmentEnd:
        """The steps of a segment. On a GPU the host launches one while the device is at the one before."""
        order, engine = self._order, self._engine
        try:
            with self._mailbox.stepping():
                while not state.done:
                    with Stopwatch(self._device) as watch:
                        self._denoiser.step(state)
                    self._note_launched()
                    self._launched = watch, engine.statistics.synchronous
                    if order.rank == 0:
                        self._mailbox.report(state.step, state.num_steps, self._preview(state))
                    if engine.yielding and not state.done:
                        self._denoiser.settle(state)
                        break
                self._note_launched()
        finally:
            self._denoiser.let_go(state)  # whatever is prepared or decoded next has its room
        if engine.communicator.world_size > 1 and state.step > order.step:
            # of one step, since to read the marks of a GPU takes its host some time
            self._waited = engine.statistics.wait_s / engine.statistics.seconds
        return SegmentEnd.DONE if state.done else SegmentEnd.YIELDED

    def _note_launched(self) -> None:
        """Note the seconds of the last step that was launched. A GPU may be at it still: it is waited for."""
        if self._launched is not None:
            (watch, synchronous), self._launched = self._launched, None
            (self._fresh_s if synchronous else self._stale_s).append(watch.seconds)

    def _preview(self, state: DenoiseState) -> Image.Image | None:
        """The picture so far, if it is to be shown after this step and is known not to be garbage."""
        if state.step not in self._order.preview_steps:
            return None
        try:
            preview = self._denoiser.preview(state)
        except NotFinite:
            return None  # decoding says so, to all ranks alike
        return None if self._engine.communicator.broken else preview

    def _decode(self, state: DenoiseState) -> list[Image.Image] | None:
        """The pictures, on rank 0; the other ranks help if the VAE is parallel."""
        if self._order.rank == 0:
            return self._denoiser.decode(state)
        if self._engine.decodes_together:
            self._denoiser.decode(state)
        return None

    def _judge(self, error: Exception) -> tuple[SegmentEnd, DistrirayError | None, str]:
        """Whose fault `error` is, the request's, a peer's or this worker's: end, error and cause.

        What is raised before the first transfer is the request's own, as long as the device works at all.
        """
        order = self._order
        match error:
            case GangBroken():
                return SegmentEnd.BROKEN, None, str(error)
            case GenerationCancelled():
                return SegmentEnd.CANCELLED, None, ""
            case DistrirayError():
                return SegmentEnd.REFUSED, error, ""
        log.error("segment %d of request %s failed", order.serial, order.request.id, exc_info=error)
        if is_out_of_memory(error):
            self._states.pop(order.job, None)
            _let_go_of_locals(error)
            self._engine.give_back()
            DEVICES[self._device.type].trim()
            request = order.request
            what = f"{request.num_images} of {request.width}x{request.height}"
            return SegmentEnd.REFUSED, OutOfMemory(f"{what} do not fit into memory: {error}"), ""
        if not self._begun and self._device_works():
            refusal = DistrirayError(f"the request could not be prepared: {told(error)}")
            return SegmentEnd.REFUSED, refusal, ""
        return SegmentEnd.FAILED, None, told(error)

    def _device_works(self) -> bool:
        """Whether the device still computes: after some errors every later call to a GPU raises."""
        try:
            return torch.ones(1, device=self._device).add(1).item() == 2.0
        except Exception:
            return False

    def _adapters(self) -> AdapterStatus:
        adapters = self._denoiser.adapters
        counts = adapters.counts
        return AdapterStatus(
            names=adapters.held,
            memory=adapters.nbytes,
            hits=counts.hits,
            loads=counts.loads,
            evictions=counts.evictions,
        )


def told(error: Exception) -> str:
    """An error's type and words, for `RankResult.cause`."""
    return f"{type(error).__name__}: {error}"


def _let_go_of_locals(error: BaseException | None) -> None:
    """Let what an error has ended hold nothing, such as activations: its traceback keeps the frames."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _alike(error: Exception) -> bool:
    """Whether all ranks of a gang raise it after the same transfers."""
    return isinstance(error, DistrirayError) and not isinstance(error, GangBroken)
