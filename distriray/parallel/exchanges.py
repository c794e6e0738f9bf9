"""Exchanges of one network: the one that a call is in, and room in memory for the buffers of all."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from distriray.collective.base import Communicator
from distriray.config import MIXES, Mix, ParallelConfig
from distriray.errors import OutOfMemory
from distriray.parallel.exchange.cache import ExchangeCache, ExchangeKey
from distriray.parallel.exchange.exchange import Exchange
from distriray.parallel.exchange.step import Step
from distriray.parallel.graphs import StepGraphs
from distriray.parallel.image import Branch
from distriray.parallel.images import Images
from distriray.parallel.network_graphs import NetworkGraphs
from distriray.parallel.networks.base import Call, Network
from distriray.parallel.room import Room
from distriray.parallel.share import Share


class Exchanges:
    """The exchanges of one network's images, each kept while its image lives and beyond while there is room.

    Args:
        network: whose layers exchange.
        images: those that live.
        graphs: what steps are captured in.

    Attributes:
        bucket_count: buckets of a displaced step, None as many as the mix wants; counts for exchanges made
            afterwards.
        room: for buffers in this device's memory; None where that is not known, and nothing is refused.
    """

    def __init__(self, network: Network, images: Images, graphs: NetworkGraphs) -> None:
        self.bucket_count: int | None = None
        self.room: Room | None = None
        self._network, self._images, self._graphs = network, images, graphs
        self._communicator: Communicator
        self._config: ParallelConfig
        self._cache = ExchangeCache()
        self._most_idle = float("inf")  # bytes of buffers not in use that the room leaves

    def join(self, communicator: Communicator, config: ParallelConfig) -> None:
        """Exchange in this gang; what was laid out for others is kept."""
        self._cache.abandon()
        self._communicator, self._config = communicator, config

    def clear(self) -> None:
        """Drop all: what was laid out no longer holds."""
        self._cache.clear()
        if self.room is not None:
            self.room.forget()
        for branch in self._images.begun:
            branch.exchange = None

    def drop_left(self) -> None:
        """Drop those of gangs that were left."""
        self._cache.drop_left(self._communicator, self._config)

    @property
    def buffer_bytes(self) -> int:
        """Memory of all buffers."""
        return self._cache.nbytes

    def make_room(self, call: Call, branch: Branch, mix: Mix | None) -> None:
        """Set room aside for a call's buffers in a mix, beside those of other images.

        Raises:
            OutOfMemory: there is not as much, with the bytes.
        """
        if self.room is None:
            return
        branch.needed = self._needed(call, mix)
        needed = sum(each.needed for each in self._images.begun)
        if needed > self.room.nbytes:
            raise OutOfMemory(self.room.refusal(needed, f"a batch of {call.batch} like this", self._config))
        self._most_idle = self.room.nbytes - needed

    def has_room(self, call: Call, branch: Branch, mix: Mix) -> bool:
        """Whether `make_room` would set it aside."""
        others = sum(each.needed for each in self._images.begun if each is not branch)
        return self.room is None or others + self._needed(call, mix) <= self.room.nbytes

    def _needed(self, call: Call, mix: Mix | None) -> int:
        assert self.room is not None
        return self.room.needed(self._network, call, self._communicator, self._config, mix)

    def step(
        self, call: Call, branch: Branch, share: Share
    ) -> tuple[AbstractContextManager[Step | None], StepGraphs | None]:
        """The step of the exchange for this call, and the graphs that it may be one of.

        The step is None without patches or without an exchange.
        """
        config, mix, before = self._config, branch.mix, branch.exchange
        if mix is not None and call.short:
            mix = MIXES["sync"]
        if mix is None:
            branch.exchange = None
            return nullcontext(), None if call.replaces_layers else self._graphs.alone
        key = ExchangeKey(
            self._communicator,
            config,
            self._images.current.stream,
            call.branch,
            mix,
            (share.part.start, share.part.stop),
            share.partition,
            call.sample.dtype,
            call.besides,
            call.short,
            self._network.adapters_that_exchange(),
            torch.is_inference_mode_enabled(),
        )
        exchange = self._cache.use(key, lambda: self._made(key, call, share))
        if call.short:  # whole steps go on from whole ones
            return exchange.step(), exchange.graphs
        branch.exchange = key
        follows = not branch.fresh_start and key == before
        if not follows:
            in_use = {branch.exchange for branch in self._images.begun if branch.exchange is not None}
            self._cache.restart(but=in_use - {key})
            self._cache.evict(in_use, min(config.max_buffer_bytes, self._most_idle))
        warmup = config.warmup_of(mix)
        warm = branch.warm if warmup == "auto" else branch.step >= warmup
        displaced = not mix.exact and warm and follows
        measure_drift = not mix.exact and warmup == "auto" and not branch.warm
        return exchange.step(displaced, measure_drift), exchange.graphs

    def _made(self, key: ExchangeKey, call: Call, share: Share) -> Exchange:
        return Exchange(
            share.communicator,
            share.partition,
            key.mix,
            key.config.prediction.weights(key.mix),
            key.config.attention,
            self._network.kinds,
            self.bucket_count,
            None if call.replaces_layers else self._graphs.new(),
        )
