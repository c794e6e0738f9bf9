"""One device's share of the work: a pipeline, the communicators it sits in, the states it holds. No Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch.distributed import Store

from ..collective import Communicator, connect
from ..denoise import Denoiser, DenoiseState
from ..errors import GangBroken, GenerationCancelled, InvalidRequest, UnsupportedModel
from ..models import ModelSpec, load_pipeline
from ..parallel import engine_of, parallelize
from .config import backend_of
from .messages import Ending, Link, Order, Outcome, Progress, Wish

ALIKE_ON_EVERY_RANK = (GenerationCancelled, InvalidRequest, UnsupportedModel)
"""Raised by all ranks of a gang after the same transfers, so that its communicator stays in order."""


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
        self._states: dict[str, DenoiseState] = {}
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

        Raises:
            Whatever preparing, stepping or decoding raises, but `GangBroken` and `GenerationCancelled`, which
            are outcomes.
        """
        with self._lock:
            self._running, self._step, self._previews = order.serial, order.step, []
        try:
            return self._run(order, blob)
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

    def export(self, request_id: str) -> bytes:
        """The state of a request that this worker holds and does not work on."""
        return self._states[request_id].to_bytes()

    def forget(self, request_ids: Sequence[str]) -> None:
        """Drop the states of requests that are over."""
        for name in request_ids:
            self._states.pop(name, None)

    @property
    def held(self) -> int:
        """Requests whose state this worker holds."""
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
        self._engine.join(communicator, order.parallel)  # requests have generators: no state to share
        began = time.perf_counter()
        state = self._state(order, blob)
        prepare_s = time.perf_counter() - began if order.step == 0 else 0.0
        formed_at = time.time() - prepare_s
        sent = communicator.bytes_sent
        fresh: list[float] = []
        stale: list[float] = []
        images, decode_s, cause = None, 0.0, ""
        try:
            ending = self._steps(order, state, fresh, stale)
            if ending is Ending.DONE:
                began = time.perf_counter()
                images = self._decode(order, state)
                decode_s = time.perf_counter() - began
        except GangBroken as error:
            communicator.abort()
            ending, cause = Ending.BROKEN, str(error)
        except GenerationCancelled:
            ending = Ending.CANCELLED
        except ALIKE_ON_EVERY_RANK:
            raise
        except BaseException:
            communicator.abort()
            raise
        left_at = time.time() - decode_s
        return Outcome(
            ending,
            state.step,
            state.num_steps,
            prepare_s,
            tuple(fresh),
            tuple(stale),
            decode_s,
            communicator.bytes_sent - sent,
            tuple(self._previews),
            images,
            cause,
            formed_at,
            left_at,
        )

    def _steps(self, order: Order, state: DenoiseState, fresh: list[float], stale: list[float]) -> Ending:
        engine = self._engine
        engine.start_image(at_step=state.step)
        with self._lock:
            self._stepping = True
            if (wish := self._wishes.get(order.serial)) is not None:
                self._pass_on(wish)
        try:
            while not state.done:
                began = time.perf_counter()
                self._denoiser.step(state)
                seconds = time.perf_counter() - began
                (fresh if engine.statistics.synchronous else stale).append(seconds)
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
        held = self._states.get(request.id)
        if held is not None and held.step == order.step:
            return held
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
        self._states[request.id] = state
        return state
