"""Cache of the exchanges of one gang, by the shape of their input."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from distriray.parallel.exchange.exchange import Exchange


class ExchangeCache:
    """Exchanges by their key, in the order of their last use."""

    def __init__(self) -> None:
        self._exchanges: OrderedDict[Hashable, Exchange] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Memory of all buffers."""
        return sum(exchange.buffer_bytes for exchange in self._exchanges.values())

    @property
    def latest(self) -> Hashable:
        """The key that was used last; None if there is none."""
        return next(reversed(self._exchanges), None)

    def use(self, key: Hashable, make: Callable[[], Exchange]) -> Exchange:
        """The exchange of a key, made if there is none."""
        exchange = self._exchanges.get(key)
        if exchange is None:
            exchange = self._exchanges[key] = make()
        self._exchanges.move_to_end(key)
        return exchange

    def restart(self) -> None:
        """Let none of the exchanges go on from its last step."""
        for exchange in self._exchanges.values():
            exchange.restart()

    def evict(self, max_idle_bytes: int) -> None:
        """Drop those used longest ago until all but the latest have at most `max_idle_bytes`."""
        while len(self._exchanges) > 1:
            idle = sum(exchange.buffer_bytes for exchange in list(self._exchanges.values())[:-1])
            if idle <= max_idle_bytes:
                return
            self._exchanges.popitem(last=False)

    def clear(self) -> None:
        """Drop all, once their transfers in flight have ended."""
        for exchange in self._exchanges.values():
            exchange.abandon()
        self._exchanges.clear()
