"""Runs segments on one device: a pipeline, the communicators it sits in, the states it holds. No Ray."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from torch.distributed import Store

from ..adapters import AdapterSpec
from ..collective import Communicator, connect
from ..collective.absent import AbsentPeers
from ..collective.all_gather import numbers_of_all
from ..config import ParallelConfig
from ..controls import ControlNetSpec
from ..denoise import Denoiser, DenoiseState
from ..denoise.adapters import MOST_BYTES
from ..denoise.pipelines.sizes import Sizes
from ..denoise.pipelines.terms import Terms
from ..errors import DistrirayError, GangBroken, GenerationCancelled, NotFinite, OutOfMemory
from ..ip_adapters import IPAdapterSpec
from ..models import ModelSpec, load_pipeline
from ..parallel import compile_blocks, engine_of, parallelize
from ..parallel.networks.base import Call
from ..parallel.room import Room
from ..parallel.stopwatch import Stopwatch
from ..picture import Picture
from ..requests import SamplingParams
from ..status import AdapterStatus
from ..steps import StepCount
from ..weights import free_bytes, told_beside
from .devices import DEVICES
from .mailbox import Mailbox
from .messages import GangMembership, RankResult, SegmentEnd, SegmentOrder, StopSignal

log = logging.getLogger("ray.serve.distriray.worker")


@dataclass
class _Work:
    """Facts of a segment so far; `begun`: all ranks were ready for its first step."""

    step: int
    state: DenoiseState | None = None
    begun: bool = False
    adapters_s: float = 0.0
    prepare_s: float = 0.0
    fresh_s: list[float] = field(default_factory=list)
    stale_s: list[float] = field(default_factory=list)
    waited: float | None = None
    decode_s: float = 0.0
    images: list[Image.Image] | None = None
    formed_at: float = 0.0
    left_at: float = 0.0
    _last: tuple[Stopwatch, bool] | None = None

    def step_launched(self, watch: Stopwatch, synchronous: bool) -> None:
        """Note the seconds of the step before this one, which a GPU may still be at: it is waited for."""
        self.step_over()
        self._last = watch, synchronous

    def step_over(self) -> None:
        """Note the seconds of the last step that was launched."""
        if self._last is not None:
            (watch, synchronous), self._last = self._last, None
            (self.fresh_s if synchronous else self.stale_s).append(watch.seconds)


class SegmentRunner:
    """Runs segments. `run` and `link` have a thread each; everything else may be called from any thread.

    Args:
        device: the device of the pipeline and of every communicator.
        store: where gangs rendezvous.
        on_progress: called after every step of a segment in which this is rank 0, and at its end.
        loras: adapters that must fit the model.
        controls, ip_adapters: ControlNets and IP-Adapters that must, and are loaded.
        lora_cache_bytes: of the adapters that are held.

    Attributes:
        control: takes signals for the segment that runs, and says how far it is.
        load_s: seconds that loading the pipeline took.
    """

    def __init__(
        self,
        spec: ModelSpec,
        device: torch.device,
        store: Store,
        timeout_s: float,
        on_progress: Callable[[], None] = lambda: None,
        *,
        loras: Sequence[AdapterSpec] = (),
        controls: Sequence[ControlNetSpec] = (),
        ip_adapters: Sequence[IPAdapterSpec] = (),
        lora_cache_bytes: int = MOST_BYTES,
    ) -> None:
        began = time.perf_counter()
        self.pipeline: Any = load_pipeline(spec, device)
        self.device = device
        self._store = store
        self._timeout_s = timeout_s
        self.mailbox = Mailbox(self._signal, on_progress)
        self._communicators: dict[str, Communicator] = {}
        self._names: dict[tuple[int, ...], str] = {}
        self._states: dict[int, DenoiseState] = {}
        # First, since its refusal lists what can be served.
        self._denoiser = Denoiser(self.pipeline, lora_cache_bytes)
        self._join(GangMembership((), "alone", 0, 1))
        engine = engine_of(parallelize(self.pipeline, self._communicators["alone"]))
        assert engine is not None
        self._engine = engine
        for control in controls:
            self._denoiser.controls.load(control)
        for ip_adapter in ip_adapters:
            self._denoiser.ip_adapters.load(ip_adapter)
        for adapter in loras:
            self._denoiser.adapters.check(adapter)
        DEVICES[device.type].trim()
        free = free_bytes(device)
        if free is not None:
            engine.room = Room(free, told_beside(self.pipeline, device, free))
        self.load_s = time.perf_counter() - began

    def link(self, memberships: Sequence[GangMembership]) -> None:
        """Make communicators, in this order; one of a group that has one replaces it.

        They take memory of the device that torch must not sit on.

        Raises:
            GangBroken: a member did not come.
        """
        DEVICES[self.device.type].trim()
        for membership in memberships:
            self._join(membership)

    def run(
        self,
        order: SegmentOrder,
        blob: bytes | None,
        pictures: Mapping[str, Picture] = MappingProxyType({}),
    ) -> RankResult:
        """One segment. `blob` is the request's state where this worker does not hold it at `order.step`.

        `pictures` are the request's, by field, where it is to be prepared.

        Whatever goes wrong is a result.
        """
        try:
            with self.mailbox.running(order.serial, order.step):
                return self._run(order, blob, pictures)
        except Exception as error:
            log.exception("segment %d of request %s failed", order.serial, order.request.id)
            return RankResult(SegmentEnd.FAILED, order.step, 0, cause=_told(error), broken=True)

    def export(self, job: int) -> bytes:
        """The state of a job that this worker holds and does not work on."""
        return self._states[job].to_bytes()

    def retain(self, jobs: Collection[int], newest: int) -> None:
        """Drop the states of all jobs up to `newest` but these."""
        for job in list(self._states):
            if job <= newest and job not in jobs:
                self._states.pop(job, None)

    def compile(self) -> None:
        """Let torch compile the network's blocks for what they meet from now on, as `compile_blocks`."""
        compile_blocks(self.pipeline)

    def rehearse(self, params: SamplingParams, rank: int, world_size: int, parallel: ParallelConfig) -> None:
        """All steps of an image, as one rank of a gang whose other ranks are absent; nothing is kept of it.

        Raises:
            InvalidRequest: the model, or such a gang, draws no such picture.
        """
        self._engine.join(AbsentPeers(rank, world_size, self.device), parallel)
        try:
            state = self._denoiser.prepare(params)
            while not state.done:
                self._denoiser.step(state)
        finally:
            self._engine.join(self._communicators["alone"], parallel)

    @property
    def room(self) -> Room | None:
        """For the buffers of gangs; None where the device's memory is not known."""
        return self._engine.room

    def calls(self, params: SamplingParams) -> list[Call]:
        """The calls of the network in a step of an image, as `Denoiser.calls`."""
        return self._denoiser.calls(params)

    def buffer_bytes_of(self, calls: Sequence[Call], world_size: int, parallel: ParallelConfig) -> int:
        """Memory of the buffers of such an image in a gang, as `Engine.buffer_bytes_of`."""
        return self._engine.buffer_bytes_of(calls, world_size, parallel)

    @property
    def pads_text(self) -> bool:
        """Whether all prompts are of as many tokens to the network."""
        return self._engine.network.pads_text

    @property
    def sizes(self) -> Sizes:
        """The sizes of the model's pictures."""
        return self._denoiser.sizes

    @property
    def terms(self) -> Terms:
        """The model's terms for a request's fields besides its size."""
        return self._denoiser.terms

    @property
    def row_unit(self) -> int:
        """Pixel rows of the smallest patch."""
        return self._engine.network.row_unit * self.sizes.latent_row

    @property
    def cuts_vae(self) -> bool:
        """Whether the VAE's decoder can be cut into patches."""
        return self._engine.decoder is not None

    @property
    def own_steps(self) -> StepCount:
        """Network calls by the model's own scheduler."""
        return self._denoiser.own_steps

    @property
    def guides(self) -> bool:
        """Whether guidance above 1 takes a second branch."""
        return self._denoiser.guides

    @property
    def held(self) -> int:
        """Jobs whose state this worker holds."""
        return len(self._states)

    def _join(self, member: GangMembership) -> None:
        communicator = connect(
            rank=member.rank,
            world_size=member.world_size,
            store=self._store if member.world_size > 1 else None,
            timeout_s=self._timeout_s,
            device=self.device,
            name=member.name,
        )
        if member.world_size > 1:
            log.info("gang %s exchanges by %r", member.name, communicator.backend)
        former = self._names.get(member.group)
        self._communicators[member.name], self._names[member.group] = communicator, member.name
        if former is not None:
            self._communicators.pop(former).close()

    def _run(self, order: SegmentOrder, blob: bytes | None, pictures: Mapping[str, Picture]) -> RankResult:
        communicator = self._communicators[order.communicator]
        sent, work = communicator.bytes_sent, _Work(order.step)
        error, cause = None, ""
        try:
            end = self._work(order, blob, pictures, communicator, work)
        except Exception as raised:
            end, error, cause = self._judge(raised, order, work)
            if work.begun and not _alike(raised) and communicator.world_size > 1:
                communicator.abort()  # else the others wait for this rank until their time is up
        return RankResult(
            end=end,
            step=work.step if work.state is None else work.state.step,
            num_steps=0 if work.state is None else work.state.num_steps,
            adapters_s=work.adapters_s,
            prepare_s=work.prepare_s,
            fresh_s=tuple(work.fresh_s),
            stale_s=tuple(work.stale_s),
            decode_s=work.decode_s,
            bytes_sent=communicator.bytes_sent - sent,
            previews=self.mailbox.previews,
            images=work.images,
            error=error,
            cause=cause,
            broken=communicator.broken,
            formed_at=work.formed_at,
            left_at=work.left_at,
            exchange=self._engine.exchange,
            waited=work.waited,
            warnings=() if work.state is None else work.state.warnings,
            adapters=self._adapters_now(),
        )

    def _work(
        self,
        order: SegmentOrder,
        blob: bytes | None,
        pictures: Mapping[str, Picture],
        communicator: Communicator,
        work: _Work,
    ) -> SegmentEnd:
        """One segment, recorded in `work`."""
        began, adapters = time.perf_counter(), self._denoiser.adapters
        switching_s = adapters.seconds
        try:
            self._engine.join(communicator, order.parallel)  # requests have generators: no state to share
            adapters.learn(order.adapters)
            state = self._state(order, blob, pictures)
            self._denoiser.adapt(state)
            work.state = state
        except Exception:
            with suppress(GangBroken):
                numbers_of_all(communicator, False)
            raise
        work.adapters_s = adapters.seconds - switching_s
        work.prepare_s = time.perf_counter() - began - work.adapters_s if order.step == 0 else 0.0
        work.formed_at = work.left_at = time.time() - work.prepare_s - work.adapters_s
        if not all(numbers_of_all(communicator, True)):
            return SegmentEnd.NOT_BEGUN
        work.begun = True
        try:
            end = self._steps(order, state, work)
        finally:
            work.left_at = time.time()
        if end is SegmentEnd.DONE:
            began = time.perf_counter()
            work.images = self._decode(order, state)
            work.decode_s = time.perf_counter() - began
        return end

    def _judge(
        self, error: Exception, order: SegmentOrder, work: _Work
    ) -> tuple[SegmentEnd, DistrirayError | None, str]:
        """Whose fault `error` is, the request's, a peer's or this worker's: end, error and cause.

        What is raised before the first transfer is the request's own, as long as the device works at all.
        """
        match error:
            case GangBroken():
                return SegmentEnd.BROKEN, None, str(error)
            case GenerationCancelled():
                return SegmentEnd.CANCELLED, None, ""
            case DistrirayError():
                return SegmentEnd.REFUSED, error, ""
        log.error("segment %d of request %s failed", order.serial, order.request.id, exc_info=error)
        if _is_out_of_memory(error):
            self._states.pop(order.job, None)
            self._engine.graphs.drop()
            DEVICES[self.device.type].trim()
            request = order.request
            what = f"{request.num_images} of {request.width}x{request.height}"
            return SegmentEnd.REFUSED, OutOfMemory(f"{what} do not fit into memory: {error}"), ""
        if not work.begun and self._device_works():
            return (
                SegmentEnd.REFUSED,
                DistrirayError(f"the request could not be prepared: {_told(error)}"),
                "",
            )
        return SegmentEnd.FAILED, None, _told(error)

    def _adapters_now(self) -> AdapterStatus:
        adapters = self._denoiser.adapters
        counts = adapters.counts
        return AdapterStatus(
            names=adapters.held,
            memory=adapters.nbytes,
            hits=counts.hits,
            loads=counts.loads,
            evictions=counts.evictions,
        )

    def _device_works(self) -> bool:
        """Whether the device still computes: after some errors every later call to a GPU raises."""
        try:
            return torch.ones(1, device=self.device).add(1).item() == 2.0
        except Exception:
            return False

    def _steps(self, order: SegmentOrder, state: DenoiseState, work: _Work) -> SegmentEnd:
        """The steps of a segment. On a GPU the host launches one while the device is at the one before."""
        engine = self._engine
        with self.mailbox.stepping():
            while not state.done:
                with Stopwatch(self.device) as watch:
                    self._denoiser.step(state)
                work.step_launched(watch, engine.statistics.synchronous)
                if order.rank == 0:
                    self.mailbox.report(state.step, state.num_steps, self._preview(order, state))
                if engine.yielding and not state.done:
                    self._denoiser.settle(state)
                    break
            work.step_over()
        if engine.communicator.world_size > 1 and state.step > order.step:
            # of one step, since to read the marks of a GPU takes its host some time
            work.waited = engine.statistics.wait_s / engine.statistics.seconds
        return SegmentEnd.DONE if state.done else SegmentEnd.YIELDED

    def _preview(self, order: SegmentOrder, state: DenoiseState) -> Image.Image | None:
        """The picture so far, if it is to be shown after this step and is known not to be garbage."""
        if state.step not in order.preview_steps:
            return None
        try:
            preview = self._denoiser.preview(state)
        except NotFinite:
            return None  # decoding says so, to all ranks alike
        return None if self._engine.communicator.broken else preview

    def _decode(self, order: SegmentOrder, state: DenoiseState) -> list[Image.Image] | None:
        """The pictures, on rank 0; the other ranks help if the VAE is parallel."""
        if order.rank == 0:
            return self._denoiser.decode(state)
        if self._engine.decodes_together:
            self._denoiser.decode(state)
        return None

    def _signal(self, signal: StopSignal) -> None:
        if signal is StopSignal.CANCEL:
            self._engine.ask_cancel()
        else:
            self._engine.ask_yield()

    def _state(
        self, order: SegmentOrder, blob: bytes | None, pictures: Mapping[str, Picture]
    ) -> DenoiseState:
        request = order.request
        state = self._states.get(order.job)
        if state is not None and state.step == order.step:
            return state
        if blob is not None:
            state = DenoiseState.from_bytes(blob).to(self.device)
        elif order.step == 0:
            state = self._denoiser.prepare(request.with_pictures(pictures))
        else:
            raise LookupError(
                f"request {request.id} is to go on at step {order.step}, but its state is not here"
            )
        self._states[order.job] = state
        return state


def _alike(error: Exception) -> bool:
    """Whether all ranks of a gang raise it after the same transfers."""
    return isinstance(error, DistrirayError) and not isinstance(error, GangBroken)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
