"""Cache of the exchanges of one gang, by the shape of their input."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable

from distriray.parallel.exchange.exchange import Exchange


class ExchangeCache:
    """Exchanges by their key, in the order of their last use."""

    def __init__(self) -> None:
        self._exchanges: OrderedDict[Hashable, Exchange] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Memory of all buffers."""
        return sum(exchange.buffer_bytes for exchange in self._exchanges.values())

    def use(self, key: Hashable, make: Callable[[], Exchange]) -> Exchange:
        """The exchange of a key, made if there is none."""
        exchange = self._exchanges.get(key)
        if exchange is None:
            exchange = self._exchanges[key] = make()
        self._exchanges.move_to_end(key)
        return exchange

    def restart(self, but: Collection[Hashable]) -> None:
        """Let none of the exchanges go on from its last step, but those of these keys."""
        for key, exchange in self._exchanges.items():
            if key not in but:
                exchange.restart()

    def evict(self, in_use: Collection[Hashable], max_idle_bytes: float) -> None:
        """Drop those used longest ago until all that are not in use have at most `max_idle_bytes`."""
        idle = {key: exchange for key, exchange in self._exchanges.items() if key not in in_use}
        excess = sum(exchange.buffer_bytes for exchange in idle.values()) - max_idle_bytes
        for key, exchange in idle.items():
            if excess <= 0:
                return
            excess -= exchange.buffer_bytes
            del self._exchanges[key]

    def clear(self) -> None:
        """Drop all, once their transfers in flight have ended."""
        for exchange in self._exchanges.values():
            exchange.abandon()
        self._exchanges.clear()
