"""The memory of a bucket, a region for each kind of value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import gcd, prod

import torch

from distriray.config import Weight
from distriray.parallel.exchange.extrapolation import Extrapolation, extrapolation_of
from distriray.parallel.exchange.own import OwnKeysValues
from distriray.parallel.exchange.reconstructions import Reconstruction
from distriray.parallel.exchange.slots import Shapes, Slot, Values


class Region(ABC):
    """One kind of value of a bucket's slots: what arrives, and what layers read.

    Args:
        received: where values arrive.
        rank: this rank.
        extrapolation: from that to what layers read; None where they read what arrives.
    """

    def __init__(self, received: torch.Tensor, rank: int, extrapolation: Extrapolation | None) -> None:
        self.rank = rank
        self._received = received
        self._extrapolation = extrapolation
        self._readable = received if extrapolation is None else extrapolation.readable

    @property
    def prediction_bytes(self) -> int:
        """Memory for prediction, which comes on top of what is received."""
        return 0 if self._extrapolation is None else self._extrapolation.nbytes

    @abstractmethod
    def stored(self, index: int) -> dict[int, torch.Tensor]:
        """The values that `store` stored for a slot, by rank."""

    def store(self, index: int, everyone: Values) -> None:
        """Keep what a synchronous step has moved, as if it had arrived."""
        for rank, kept in self.stored(index).items():
            kept.copy_(everyone[rank])

    def begin(self) -> None:
        """Begin an image."""
        if self._extrapolation is not None:
            self._extrapolation.begin()

    def remember(self, read: bool) -> None:
        """Make the received values, which layers have `read` or not, those of the step before."""
        if self._extrapolation is not None:
            self._extrapolation.remember(read)

    def predict(self, steps: int) -> None:
        """Make what layers read: what was received, or what follows from that and the steps before."""
        if self._extrapolation is not None:
            self._extrapolation.predict(steps)


class StatisticsRegion(Region):
    """Group-norm statistics: the head of every rank's row of the flat messages.

    Args:
        slots: by index.
        outbox, inbox: the rows, float32 (ranks, numbers).
    """

    def __init__(
        self, slots: Mapping[int, Slot], outbox: torch.Tensor, inbox: torch.Tensor, rank: int, weight: Weight
    ) -> None:
        shapes = {index: slot.shape for index, slot in slots.items()}
        lengths = [prod(shape) for shape in shapes.values()]
        super().__init__(inbox, rank, _extrapolated(inbox, weight, [lengths] * len(inbox)))
        self._outbox = outbox
        self._arrived = _columns(shapes, inbox)
        self._statistics = _columns(shapes, self._readable)

    @staticmethod
    def row_bytes(slots: Mapping[int, Slot]) -> int:
        """Bytes of a row."""
        return sum(4 * prod(slot.shape) for slot in slots.values())

    def read(self, index: int) -> torch.Tensor:
        """(ranks, batch, groups, 2); this rank's row is what it last sent, until it puts in what it sends."""
        return self._statistics[index]

    def pack(self) -> None:
        """Put this rank's row into the message to every peer."""
        own = self._readable[self.rank]
        self._outbox.copy_(own.expand_as(self._outbox))
        if self._extrapolation is not None:  # nothing arrives in this row: what was last sent stays there
            self._received[self.rank].copy_(own)

    def stored(self, index: int) -> dict[int, torch.Tensor]:
        return dict(enumerate(self._arrived[index]))

    def store(self, index: int, everyone: Values) -> None:
        super().store(index, everyone)
        self._statistics[index][self.rank].copy_(everyone[self.rank])


class HaloRegion(Region):
    """Halo rows: the tail of every peer's row of the flat messages, as long as this pair of ranks needs.

    Args:
        sent, received: where the slots' messages lie in the rows.
        outbox, inbox: the rows, (ranks, numbers) of the halos' dtype.
    """

    def __init__(
        self,
        sent: Packing,
        received: Packing,
        outbox: torch.Tensor,
        inbox: torch.Tensor,
        rank: int,
        weight: Weight,
    ) -> None:
        peers = range(len(inbox))[received.rows]
        parts = [received.parts[peer] for peer in peers]
        super().__init__(inbox, rank, _extrapolated(inbox[received.rows], weight, parts))
        self._outbox = sent.views(outbox)
        self._arrived = received.views(inbox)
        self._halos = self._arrived
        if self._extrapolation is not None:
            self._halos = received.views(dict(zip(peers, self._readable, strict=True)))

    def read(self, index: int) -> dict[int, torch.Tensor]:
        """Each peer's rows, (batch, channels, rows, columns)."""
        return self._halos[index]

    def send(self, index: int, sends: Values) -> None:
        """Put the rows that each peer needs into the message to it."""
        outbox = self._outbox[index]
        for peer, rows in sends.items():
            outbox[peer].copy_(rows)

    def stored(self, index: int) -> dict[int, torch.Tensor]:
        return self._arrived[index]


class Packing:
    """Places of messages behind one another, for each peer.

    Args:
        messages: those of each slot, by its index.
        ranks: ranks of the exchange.
    """

    def __init__(self, messages: Mapping[int, Shapes], ranks: int) -> None:
        self.parts: list[list[int]] = [[] for _ in range(ranks)]
        """Numbers of each message in the row of each rank."""
        self._places: dict[int, dict[int, tuple[int, tuple[int, ...]]]] = {}
        for index, pairs in messages.items():
            self._places[index] = {}
            for peer, shape in pairs:
                self._places[index][peer] = sum(self.parts[peer]), shape
                self.parts[peer].append(prod(shape))

    @property
    def lengths(self) -> list[int]:
        """Numbers in the row of each rank."""
        return [sum(parts) for parts in self.parts]

    @property
    def rows(self) -> slice:
        """Those that hold messages, and as few others as one slice can have."""
        held = [peer for peer, parts in enumerate(self.parts) if parts] or [0]
        return slice(held[0], held[-1] + 1, gcd(*(peer - held[0] for peer in held)) or 1)

    def views(self, rows: torch.Tensor | Mapping[int, torch.Tensor]) -> dict[int, dict[int, torch.Tensor]]:
        """Each slot's messages within `rows`, each of numbers, by peer."""
        return {
            index: {
                peer: rows[peer][start : start + prod(shape)].view(shape)
                for peer, (start, shape) in places.items()
            }
            for index, places in self._places.items()
        }


class KeysValuesRegion(Region):
    """Keys and values of the slots of one level, token by token, with each slot's columns side by side.

    The layout is (tokens, slots x 2 x batch x channels): a peer's tokens are contiguous over all slots, so
    they are received in place, into the buffer that attention reads.

    Args:
        slots: by index, all of the same tokens and dtype.
    """

    def __init__(self, slots: Mapping[int, Slot], device: torch.device, rank: int, weight: float) -> None:
        slot = next(iter(slots.values()))
        self._shapes = {index: slot.shape[1:] for index, slot in slots.items()}
        size = (sum(slot.extents), sum(map(prod, self._shapes.values())))
        received = torch.zeros(size, dtype=slot.dtype, device=device)
        super().__init__(received, rank, extrapolation_of(received, weight))
        self._tokens = slot.extents
        self._arrived = _columns(self._shapes, self._received)
        self._keys_values = _columns(self._shapes, self._readable) if weight else self._arrived
        self._parts = self._received.split(self._tokens)

    @property
    def nbytes(self) -> int:
        return self._received.nbytes + self.prediction_bytes

    def messages(self, peers: tuple[int, ...]) -> tuple[Values, Values]:
        """Messages for each peer, and room for those from it."""
        return dict.fromkeys(peers, self._parts[self.rank]), {peer: self._parts[peer] for peer in peers}

    def arrive(self) -> None:
        """Make values of the messages that have arrived."""

    def read(self, index: int) -> torch.Tensor:
        """(tokens of all ranks, 2, batch, channels)."""
        return self._keys_values[index]

    def send(self, index: int, own: OwnKeysValues) -> None:
        """Put this rank's keys and values among those of all ranks."""
        arrived, readable = (
            buffer[index].split(self._tokens)[self.rank] for buffer in (self._arrived, self._keys_values)
        )
        own.put(arrived)
        if self._keys_values is not self._arrived:
            readable.copy_(arrived)

    def stored(self, index: int) -> dict[int, torch.Tensor]:
        return dict(enumerate(self._arrived[index].split(self._tokens)))


class ChangingKeysValues(KeysValuesRegion):
    """Keys and values that are sent as their changes in few bits, and received beside what layers read.

    Args:
        bits: of a number of a change.
    """

    def __init__(
        self, slots: Mapping[int, Slot], device: torch.device, rank: int, weight: float, bits: int
    ) -> None:
        super().__init__(slots, device, rank, weight)
        self._sent = Reconstruction(torch.zeros_like(self._parts[rank]), bits)
        self._known = _columns(self._shapes, self._sent.values)
        self._reconstructions = {
            peer: Reconstruction(part, bits) for peer, part in enumerate(self._parts) if peer != rank
        }
        self._changes = {
            peer: known.values.new_empty(known.message_bytes, dtype=torch.uint8)
            for peer, known in self._reconstructions.items()
        }

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(buffer.nbytes for buffer in (self._sent.values, *self._changes.values()))

    def messages(self, peers: tuple[int, ...]) -> tuple[Values, Values]:
        return dict.fromkeys(peers, self._sent.encode(self._parts[self.rank])), self._changes

    def arrive(self) -> None:
        for peer, known in self._reconstructions.items():
            known.decode(self._changes[peer])

    def store(self, index: int, everyone: Values) -> None:
        super().store(index, everyone)
        self._known[index].copy_(everyone[self.rank])


def _columns(shapes: Mapping[int, tuple[int, ...]], rows: torch.Tensor) -> dict[int, torch.Tensor]:
    """Each slot's columns within `rows`, which hold all slots' side by side: (rows, *its shape)."""
    starts = accumulate(map(prod, shapes.values()), initial=0)
    return {
        index: rows[:, start : start + prod(shape)].unflatten(1, shape)
        for (index, shape), start in zip(shapes.items(), starts, strict=False)
    }


def _extrapolated(
    rows: torch.Tensor, weight: Weight, lengths: Sequence[Sequence[int]]
) -> Extrapolation | None:
    """Extrapolation of rows that have parts of these lengths, and something left over."""
    if not any(lengths):
        return None
    parts = [part for row in lengths for part in (*row, rows.shape[1] - sum(row))]
    return extrapolation_of(rows, weight, parts)
