"""One device's share of the work: a pipeline, the communicators it sits in, the states it holds. No Ray."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch.distributed import Store

from ..collective import Communicator, connect
from ..denoise import Denoiser, DenoiseState
from ..errors import DistrirayError, GangBroken, GenerationCancelled, OutOfMemory
from ..models import ModelSpec, load_pipeline
from ..parallel import engine_of, parallelize
from .config import backend_of
from .messages import Ending, Link, Order, Outcome, Progress, Wish

log = logging.getLogger("ray.serve.distriray.worker")


@dataclass
class _Work:
    """What there is to say of a segment so far; `begun`: all ranks were ready for its first step."""

    step: int
    state: DenoiseState | None = None
    begun: bool = False
    prepare_s: float = 0.0
    fresh_s: list[float] = field(default_factory=list)
    stale_s: list[float] = field(default_factory=list)
    decode_s: float = 0.0
    images: list[Image.Image] | None = None
    formed_at: float = 0.0
    left_at: float = 0.0


class Stage:
    """Runs segments. `run` and `link` have a thread each; everything else may come from any thread.

    Args:
        device: the device of the pipeline and of every communicator.
        store: where gangs rendezvous.
        on_progress: called after every step of a segment in which this is rank 0, and at its end.
    """

    def __init__(
        self,
        spec: ModelSpec,
        device: torch.device,
        store: Store,
        timeout_s: float,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.pipeline: Any = load_pipeline(spec, device)
        self.device = device
        self._store = store
        self._timeout_s = timeout_s
        self._on_progress = on_progress
        self._communicators: dict[str, Communicator] = {}
        self._names: dict[tuple[int, ...], str] = {}
        self._states: dict[int, DenoiseState] = {}
        self._wishes: dict[int, Wish] = {}
        self._lock = threading.Lock()
        self._running: int | None = None
        self._stepping = False
        self._ended = -1
        self._step = self._num_steps = 0
        self._previews: list[tuple[int, Any]] = []
        self._join(Link((), "alone", 0, 1))
        engine = engine_of(parallelize(self.pipeline, self._communicators["alone"]))
        assert engine is not None
        self._engine = engine
        self._denoiser = Denoiser(self.pipeline)

    def link(self, links: Sequence[Link]) -> None:
        """Make communicators, in this order; one of a group that has one replaces it.

        Raises:
            GangBroken: a member did not come.
        """
        for link in links:
            self._join(link)

    def run(self, order: Order, blob: bytes | None) -> Outcome:
        """One segment. `blob` is the request's state where this worker does not hold it at `order.step`.

        Whatever goes wrong is an outcome.
        """
        with self._lock:
            self._running, self._step, self._previews = order.serial, order.step, []
        try:
            return self._run(order, blob)
        except Exception as error:
            log.exception("segment %d of request %s failed", order.serial, order.request.id)
            return Outcome(Ending.FAILED, order.step, 0, cause=_told(error), broken=True)
        finally:
            with self._lock:
                self._running, self._ended = None, order.serial
                self._wishes = {s: wish for s, wish in self._wishes.items() if s > order.serial}
            self._on_progress()

    def ask(self, serial: int, wish: Wish) -> None:
        """Let segment `serial` leave after the step it is in; nothing happens if it is over already."""
        with self._lock:
            if serial <= self._ended:
                return
            if self._wishes.get(serial) is not Wish.CANCEL:
                self._wishes[serial] = wish
            if self._running == serial and self._stepping:
                self._pass_on(wish)

    def progress(self, serial: int) -> Progress:
        """How far segment `serial` is."""
        with self._lock:
            if serial != self._running:
                return Progress(0, 0, serial <= self._ended)
            return Progress(self._step, self._num_steps, False, tuple(self._previews))

    def export(self, job: int) -> bytes:
        """The state of a job that this worker holds and does not work on."""
        return self._states[job].to_bytes()

    def retain(self, jobs: Collection[int], newest: int) -> None:
        """Drop the states of all jobs up to `newest` but these."""
        for job in list(self._states):
            if job <= newest and job not in jobs:
                self._states.pop(job, None)

    @property
    def held(self) -> int:
        """Jobs whose state this worker holds."""
        return len(self._states)

    def close(self) -> None:
        """Leave every gang."""
        for communicator in self._communicators.values():
            communicator.close()

    def _join(self, link: Link) -> None:
        communicator = connect(
            backend_of(self.device.type, link.world_size),
            rank=link.rank,
            world_size=link.world_size,
            store=self._store if link.world_size > 1 else None,
            timeout_s=self._timeout_s,
            device=self.device,
            name=link.name,
        )
        former = self._names.get(link.group)
        self._communicators[link.name], self._names[link.group] = communicator, link.name
        if former is not None:
            self._communicators.pop(former).close()

    def _run(self, order: Order, blob: bytes | None) -> Outcome:
        communicator = self._communicators[order.link]
        sent, work = communicator.bytes_sent, _Work(order.step)
        error, cause = None, ""
        try:
            ending = self._work(order, blob, communicator, work)
        except Exception as raised:
            ending, error, cause = self._judge(raised, order, work)
            if work.begun and not _alike(raised) and communicator.world_size > 1:
                communicator.abort()  # else the others wait for this rank until their time is up
        return Outcome(
            ending=ending,
            step=work.step if work.state is None else work.state.step,
            num_steps=0 if work.state is None else work.state.num_steps,
            prepare_s=work.prepare_s,
            fresh_s=tuple(work.fresh_s),
            stale_s=tuple(work.stale_s),
            decode_s=work.decode_s,
            bytes_sent=communicator.bytes_sent - sent,
            previews=tuple(self._previews),
            images=work.images,
            error=error,
            cause=cause,
            broken=communicator.broken,
            formed_at=work.formed_at,
            left_at=work.left_at,
        )

    def _work(self, order: Order, blob: bytes | None, communicator: Communicator, work: _Work) -> Ending:
        """One segment, recorded in `work`."""
        began = time.perf_counter()
        try:
            self._engine.bind(communicator, order.parallel)  # requests have generators: no state to share
            work.state = state = self._state(order, blob)
        except Exception:
            with suppress(GangBroken):
                _all_ready(communicator, False)
            raise
        work.prepare_s = time.perf_counter() - began if order.step == 0 else 0.0
        work.formed_at = work.left_at = time.time() - work.prepare_s
        if not _all_ready(communicator, True):
            return Ending.NOT_BEGUN
        work.begun = True
        try:
            ending = self._steps(order, state, work)
        finally:
            work.left_at = time.time()
        if ending is Ending.DONE:
            began = time.perf_counter()
            work.images = self._decode(order, state)
            work.decode_s = time.perf_counter() - began
        return ending

    def _judge(
        self, error: Exception, order: Order, work: _Work
    ) -> tuple[Ending, DistrirayError | None, str]:
        """Whose fault `error` is, the request's, a peer's or this worker's: ending, error and cause.

        What is raised before the first transfer is the request's own, as long as the device works at all.
        """
        match error:
            case GangBroken():
                return Ending.BROKEN, None, str(error)
            case GenerationCancelled():
                return Ending.CANCELLED, None, ""
            case DistrirayError():
                return Ending.REFUSED, error, ""
        log.error("segment %d of request %s failed", order.serial, order.request.id, exc_info=error)
        if _is_out_of_memory(error):
            self._states.pop(order.job, None)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            request = order.request
            what = f"{request.num_images} of {request.width}x{request.height}"
            return Ending.REFUSED, OutOfMemory(f"{what} do not fit into memory: {error}"), ""
        if not work.begun and self._device_works():
            return Ending.REFUSED, DistrirayError(f"the request could not be prepared: {_told(error)}"), ""
        return Ending.FAILED, None, _told(error)

    def _device_works(self) -> bool:
        """Whether the device still computes: after some errors every later call to a GPU raises."""
        try:
            return torch.ones(1, device=self.device).add(1).item() == 2.0
        except Exception:
            return False

    def _steps(self, order: Order, state: DenoiseState, work: _Work) -> Ending:
        engine = self._engine
        engine.restart(state.step)
        with self._lock:
            self._stepping = True
            if (wish := self._wishes.get(order.serial)) is not None:
                self._pass_on(wish)
        try:
            while not state.done:
                began = time.perf_counter()
                self._denoiser.step(state)
                seconds = time.perf_counter() - began
                (work.fresh_s if engine.statistics.synchronous else work.stale_s).append(seconds)
                if order.rank == 0:
                    self._report(order, state)
                if engine.yielding and not state.done:
                    return Ending.YIELDED
            return Ending.DONE
        finally:
            with self._lock:
                self._stepping = False

    def _decode(self, order: Order, state: DenoiseState) -> list[Image.Image] | None:
        """The pictures, on rank 0; the other ranks help if the VAE is parallel."""
        if order.rank == 0:
            return self._denoiser.decode(state)
        if self._engine.decodes_together:
            self._denoiser.decode(state)
        return None

    def _report(self, order: Order, state: DenoiseState) -> None:
        preview = None
        if state.step in order.preview_steps:
            preview = self._denoiser.preview(state)
        with self._lock:
            self._step, self._num_steps = state.step, state.num_steps
            if preview is not None:
                self._previews.append((state.step, preview))
        self._on_progress()

    def _pass_on(self, wish: Wish) -> None:
        if wish is Wish.CANCEL:
            self._engine.ask_cancel()
        else:
            self._engine.ask_yield()

    def _state(self, order: Order, blob: bytes | None) -> DenoiseState:
        request = order.request
        state = self._states.get(order.job)
        if state is not None and state.step == order.step:
            return state
        if blob is not None:
            state = DenoiseState.from_bytes(blob).to(self.device)
        elif order.step == 0:
            state = self._denoiser.prepare(
                prompt=request.prompt,
                negative_prompt=request.negative_prompt,
                height=request.height,
                width=request.width,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                guidance_rescale=request.guidance_rescale,
                seeds=request.seeds,
                scheduler=request.scheduler,
            )
        else:
            raise LookupError(
                f"request {request.id} is to go on at step {order.step}, but its state is not here"
            )
        self._states[order.job] = state
        return state


def _all_ready(communicator: Communicator, ready: bool) -> bool:
    """Whether all ranks are; all of them call it. Raises GangBroken."""
    mine = torch.tensor([ready], device=communicator.device)
    theirs = {r: torch.empty_like(mine) for r in range(communicator.world_size) if r != communicator.rank}
    communicator.exchange(dict.fromkeys(theirs, mine), theirs).wait()
    everyone = [bool(other) for other in theirs.values()]
    communicator.exchange({}, {})  # raises if what was received is not to be trusted
    return ready and all(everyone)


def _alike(error: Exception) -> bool:
    """Whether all ranks of a gang raise it after the same transfers."""
    return isinstance(error, DistrirayError) and not isinstance(error, GangBroken)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
