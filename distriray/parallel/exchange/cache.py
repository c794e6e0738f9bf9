"""Cache of exchanges, by their gang and by the shape of what they share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from typing import NamedTuple

import torch

from distriray.collective.base import Communicator
from distriray.config import Mix, ParallelConfig
from distriray.parallel.exchange.exchange import Exchange
from distriray.parallel.partition import Partition


class ExchangeKey(NamedTuple):
    """All that decides what an exchange lays out, and whose it is.

    Attributes:
        communicator, config: the gang.
        stream: number of the image among those that live at the same time.
        branch: of guidance, where each has calls of its own.
        mix: the values that displaced steps take from the step before.
        part: first and last entry of the batch, and one, that this rank computes.
        partition: who owns which rows.
        dtype: of the sample.
        besides: names what else runs in the call.
        short: whether it is of short steps.
        adapters: those in use, of which some layers exchange too.
        inference: whether buffers are made in inference mode: such cannot be written outside it.
    """

    communicator: Communicator
    config: ParallelConfig
    stream: int
    branch: Hashable
    mix: Mix
    part: tuple[int, int]
    partition: Partition
    dtype: torch.dtype
    besides: Hashable
    short: bool
    adapters: Hashable
    inference: bool


class ExchangeCache:
    """Exchanges by their key, in the order of their last use."""

    def __init__(self) -> None:
        self._exchanges: OrderedDict[ExchangeKey, Exchange] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Memory of all buffers."""
        return sum(exchange.buffer_bytes for exchange in self._exchanges.values())

    def use(self, key: ExchangeKey, make: Callable[[], Exchange]) -> Exchange:
        """The exchange of a key, made if there is none."""
        exchange = self._exchanges.get(key)
        if exchange is None:
            exchange = self._exchanges[key] = make()
        self._exchanges.move_to_end(key)
        return exchange

    def restart(self, but: Collection[ExchangeKey]) -> None:
        """Let none of the exchanges go on from its last step, but those of these keys."""
        for key, exchange in self._exchanges.items():
            if key not in but:
                exchange.restart()

    def evict(self, in_use: Collection[ExchangeKey], max_idle_bytes: float) -> None:
        """Drop those used longest ago until all that are not in use have at most `max_idle_bytes`.

        Those of gangs that are over go first.
        """
        idle = {key: exchange for key, exchange in self._exchanges.items() if key not in in_use}
        for key in [key for key, exchange in idle.items() if exchange.broken]:
            del self._exchanges[key], idle[key]
        excess = sum(exchange.buffer_bytes for exchange in idle.values()) - max_idle_bytes
        for key, exchange in idle.items():
            if excess <= 0:
                return
            excess -= exchange.buffer_bytes
            del self._exchanges[key]

    def drop_left(self, communicator: Communicator, config: ParallelConfig) -> None:
        """Drop all but those of this gang."""
        self.evict({key for key in self._exchanges if key[:2] == (communicator, config)}, 0)

    def abandon(self) -> None:
        """Wait until no transfer is in flight; drop those of gangs that are over."""
        for exchange in self._exchanges.values():
            exchange.abandon()
        self.evict((), float("inf"))

    def clear(self) -> None:
        """Drop all, once their transfers in flight have ended."""
        self.abandon()
        self._exchanges.clear()
