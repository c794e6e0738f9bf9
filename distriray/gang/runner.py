"""What runs segments on one device: a pipeline, the communicators it sits in, the states it holds. No Ray."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.distributed import Store

from distriray.adapters import CACHE_BYTES, AdapterSpec
from distriray.collective import Communicator, connect
from distriray.collective.absent import AbsentPeers
from distriray.config import ParallelConfig
from distriray.controls import ControlNetSpec
from distriray.denoise import Denoiser, DenoiseState
from distriray.gang.devices import DEVICES
from distriray.gang.mailbox import Mailbox
from distriray.gang.messages import (
    ALONE,
    GangMembership,
    RankResult,
    SegmentEnd,
    SegmentOrder,
    StopSignal,
    WorkerFacts,
)
from distriray.gang.rank_segment import RankSegment, told
from distriray.ip_adapters import IPAdapterSpec
from distriray.models import ModelSpec, load_pipeline
from distriray.parallel import compile_blocks, engine_of, parallelize
from distriray.parallel.networks.base import Call
from distriray.parallel.room import Room
from distriray.picture import Picture
from distriray.requests import SamplingParams
from distriray.weights import free_bytes, told_beside

log = logging.getLogger("ray.serve.distriray.worker")


class SegmentRunner:
    """One copy of the pipeline, in the gangs that its worker is in, with the states that the worker holds.

    `run` and `link` have a thread each; everything else may be called from any thread.

    Args:
        device: the device of the pipeline and of every communicator.
        store: where gangs rendezvous.
        on_progress: called after every step of a segment in which this is rank 0, and at its end.
        loras: adapters that must fit the model.
        controls, ip_adapters: ControlNets and IP-Adapters that must, and are loaded.
        lora_cache_bytes: of the adapters that are held.

    Attributes:
        mailbox: takes signals for the segment that runs, and says how far it is.
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
        lora_cache_bytes: int = CACHE_BYTES,
    ) -> None:
        began = time.perf_counter()
        self.pipeline: Any = load_pipeline(spec, device)
        self.device = device
        self._model = spec.name
        self._store = store
        self._timeout_s = timeout_s
        self.mailbox = Mailbox(self._signal, on_progress)
        self._communicators: dict[str, Communicator] = {}
        self._names: dict[tuple[int, ...], str] = {}
        self._states: dict[int, DenoiseState] = {}
        self._dropped: list[DenoiseState] = []  # whose tensors the thread that computes is to let go of
        # First, since its refusal lists what can be served.
        self._denoiser = Denoiser(self.pipeline, lora_cache_bytes)
        self._join(GangMembership((), ALONE, 0, 1))
        engine = engine_of(parallelize(self.pipeline, self._communicators[ALONE]))
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
            engine.exchanges.room = Room(free, told_beside(self.pipeline, device, free))
        self._load_s = time.perf_counter() - began

    def link(self, memberships: Sequence[GangMembership]) -> None:
        """Make communicators, in this order; one of a group that has one replaces it.

        They take memory of the device that torch must not sit on.

        Raises:
            GangBroken: a member did not come.
        """
        DEVICES[self.device.type].trim()
        for communicator in self._communicators.values():
            if communicator.broken:
                communicator.close()  # which gives its memory back, before another one takes as much
        for membership in memberships:
            self._join(membership)

    def run(
        self,
        order: SegmentOrder,
        blob: bytes | None,
        pictures: Mapping[str, Picture] = MappingProxyType({}),
    ) -> RankResult:
        """One segment. `blob` is the request's state where the host does not know that this worker holds it.

        `pictures` are the request's, by field, where it is to be prepared.

        Whatever goes wrong is a result.
        """
        self._dropped.clear()
        try:
            with self.mailbox.running(order.serial, order.step):
                segment = RankSegment(
                    order,
                    self._communicators[order.communicator],
                    self.device,
                    self._denoiser,
                    self._engine,
                    self._states,
                    self.mailbox,
                )
                return segment.run(blob, pictures)
        except Exception as error:
            log.exception("segment %d of request %s failed", order.serial, order.request.id)
            return RankResult(SegmentEnd.FAILED, order.step, cause=told(error), broken=True)

    def export(self, job: int) -> bytes:
        """The state of a job that this worker holds and does not work on."""
        return self._states[job].to_bytes()

    def retain(self, jobs: Collection[int], newest: int) -> None:
        """Drop the states of all jobs up to `newest` but these.

        Their memory is given back when the next segment begins: to ask torch's allocator may stop whoever
        does, and with it all threads (`Worker.ping`).
        """
        for job in list(self._states):
            if job <= newest and job not in jobs and (state := self._states.pop(job, None)) is not None:
                self._dropped.append(state)

    def compile(self) -> None:
        """Let torch compile the network's blocks for what they meet from now on, as `compile_blocks`."""
        compile_blocks(self.pipeline)

    def rehearse(self, params: SamplingParams, rank: int, world_size: int, parallel: ParallelConfig) -> None:
        """All steps of an image, as one rank of a gang whose other ranks are absent; nothing is kept of it.

        Raises:
            InvalidRequest: the model, or such a gang, draws no such picture.
        """
        peers = AbsentPeers(rank, world_size, self.device)
        self._engine.join(peers, parallel)
        try:
            state = self._denoiser.prepare(params)
            while not state.done:
                self._denoiser.step(state)
        finally:
            peers.close()
            self._engine.join(self._communicators[ALONE], parallel)

    def facts(self) -> WorkerFacts:
        """What the host is told of this worker."""
        device, network, sizes = DEVICES[self.device.type], self._engine.network, self._denoiser.sizes
        return WorkerFacts(
            pid=os.getpid(),
            device=str(self.device),
            device_name=device.product(),
            model=self._model,
            default_size=sizes.default,
            size_unit=sizes.unit,
            row_unit=network.row_unit * sizes.latent_row,
            cuts_vae=self._engine.decoder is not None,
            has_short_steps=network.has_short_steps,
            key_heads=min(network.key_heads, default=None),
            load_s=self._load_s,
            memory=device.memory(),
            terms=self._denoiser.terms,
            own_steps=self._denoiser.own_steps,
            guides=self._denoiser.guides,
        )

    @property
    def room(self) -> Room | None:
        """For the buffers of gangs; None where the device's memory is not known."""
        return self._engine.exchanges.room

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

    def _signal(self, signal: StopSignal) -> None:
        if signal is StopSignal.CANCEL:
            self._engine.ask_cancel()
        else:
            self._engine.ask_yield()
