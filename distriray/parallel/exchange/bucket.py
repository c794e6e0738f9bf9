"""One bucket of the exchange: a run of slots whose messages travel together."""

from __future__ import annotations

from itertools import accumulate
from math import prod

import torch

from distriray.collective.base import Communicator, Work
from distriray.config import Prediction
from distriray.parallel.exchange.slots import Slot

_ALIGN = 16


class Bucket:
    """Buffers and transfers of consecutive slots.

    Statistics and halos of all slots form one flat message per peer. Keys and values lie token by token,
    `[tokens, slots of that level x 2 x batch x channels]`, so that a peer's tokens are contiguous across all
    slots: they are received in place, into the buffer that attention reads.

    Args:
        communicator: the ranks of the exchange.
        slots: the slots, in order.
        first: index of the first of them within the step.
        prediction: extrapolation weights.
    """

    def __init__(
        self, communicator: Communicator, slots: list[Slot], first: int, prediction: Prediction
    ) -> None:
        self.first = first
        self.last = first + len(slots) - 1
        self._communicator = communicator
        self._rank = communicator.rank
        self._peers = [peer for peer in range(communicator.world_size) if peer != self._rank]
        self._slots = slots
        self._prediction = prediction
        self._statistics_weight = prediction.statistics_among(communicator.world_size)
        self._works: list[Work] = []
        self._lay_out_small()
        self._lay_out_keys_values()

    @property
    def nbytes(self) -> int:
        """Memory of the buffers."""
        tensors = [self._outbox, *self._arrays(self._small), *self._arrays(self._wide)]
        return sum({t.data_ptr(): t.nbytes for t in tensors if t is not None}.values())

    # Reading: what the peers sent for a slot, one step ago (or in this step, if it is synchronous)

    def statistics(self, index: int) -> torch.Tensor:
        """float32 (ranks, batch, groups, 2); the own row is what `set_statistics` last stored."""
        return self._statistics[index - self.first]

    def halos(self, index: int) -> dict[int, torch.Tensor]:
        """Each peer's rows, (batch, channels, rows, columns)."""
        return self._inbox_halos[index - self.first]

    def keys_values(self, index: int) -> torch.Tensor:
        """(tokens of all ranks, 2, batch, channels)."""
        return self._keys_values[index - self.first]

    def own(self, index: int) -> torch.Tensor:
        """What this rank last sent for a slot of statistics or of keys and values."""
        slot = self._slots[index - self.first]
        if slot.kind == "statistics":
            return self.statistics(index)[self._rank]
        return self._received_keys_values[index - self.first].split(slot.extents)[self._rank]

    def received(self, index: int) -> dict[int, torch.Tensor]:
        """What `store` stored for a slot."""
        slot = self._slots[index - self.first]
        if slot.kind == "statistics":
            return dict(enumerate(self._received_statistics[index - self.first]))
        if slot.kind == "halos":
            return self._received_halos[index - self.first]
        return dict(enumerate(self._received_keys_values[index - self.first].split(slot.extents)))

    # Writing: what this rank sends

    def set_statistics(self, index: int, own: torch.Tensor) -> None:
        at = index - self.first
        self._outbox_statistics[at].copy_(own.expand_as(self._outbox_statistics[at]))
        self._statistics[at][self._rank].copy_(own)

    def set_halos(self, index: int, sends: dict[int, torch.Tensor]) -> None:
        for peer, rows in sends.items():
            self._outbox_halos[index - self.first][peer].copy_(rows)

    def set_keys_values(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        at = index - self.first
        received, values = self._received_keys_values[at], self._keys_values[at]
        for buffer in (received,) if values is received else (received, values):
            own = buffer.split(self._slots[at].extents)[self._rank]
            own[:, 0], own[:, 1] = key.transpose(0, 1), value.transpose(0, 1)

    def store(self, index: int, everyone: dict[int, torch.Tensor]) -> None:
        """Keep what a synchronous slot moved, for the next step."""
        for rank, kept in self.received(index).items():
            kept.copy_(everyone[rank])
        if self._slots[index - self.first].kind == "statistics":
            self._statistics[index - self.first][self._rank].copy_(everyone[self._rank])

    # Transfers

    def launch(self) -> None:
        """Send this step's values, and receive the peers' for the next one, in the background."""
        exchange = self._communicator.exchange
        sends = {peer: self._outbox[peer, : self._sent[peer]] for peer in self._peers if self._sent[peer]}
        receives = {
            peer: self._small[0][peer, : self._taken[peer]] for peer in self._peers if self._taken[peer]
        }
        self._works.append(exchange(sends, receives))
        for tokens, received, *_ in self._wide:
            parts = received.split(tokens)
            self._works.append(
                exchange(dict.fromkeys(self._peers, parts[self._rank]), {p: parts[p] for p in self._peers})
            )

    def wait(self) -> None:
        """Wait for the transfers in flight: received values may be read, own ones overwritten."""
        while self._works:
            self._works.pop(0).wait()

    # Prediction

    def remember(self) -> None:
        """Before new values arrive: the received ones become the ones before."""
        if self._small[2] is not None:
            self._small[2].copy_(self._small[0])
        for _, received, _, previous in self._wide:
            if previous is not None:
                previous.copy_(received)

    def predict(self, history: int) -> None:
        """Make what layers read from what was received: last + w * (last - one before)."""
        received, values, previous = self._small
        if previous is not None and values is not None:
            own = self._statistics_bytes(values)[self._rank].clone()
            for region, weight in (
                (self._statistics_bytes, self._statistics_weight),
                (self._halo_bytes, self._prediction.halos),
            ):
                _extrapolate(
                    region(previous), region(received), region(values), weight if history > 1 else 0.0
                )
            self._statistics_bytes(values)[self._rank].copy_(own)
        for _, received, values, previous in self._wide:
            if previous is not None and values is not None:
                _extrapolate(previous, received, values, self._prediction.keys_values if history > 1 else 0.0)
        self.remember()

    # Layout

    def _lay_out_small(self) -> None:
        """Rows of bytes, one per rank: all statistics first, then the halos that this pair of ranks swaps."""
        ranks = self._communicator.world_size
        device = self._communicator.device
        sizes = [4 * prod(s.send[0][1]) if s.kind == "statistics" else 0 for s in self._slots]
        offsets = [0, *accumulate(sizes)]
        self._statistics_size = -(-offsets[-1] // _ALIGN) * _ALIGN
        halos = [s for s in self._slots if s.kind == "halos"]
        self._halo_dtype = halos[0].dtype if halos else torch.float32
        itemsize = self._halo_dtype.itemsize
        self._sent, self._taken = ([self._statistics_size if offsets[-1] else 0] * ranks for _ in range(2))
        places: list[tuple[dict[int, tuple[int, tuple[int, ...]]], ...]] = []
        for slot in self._slots:
            place: tuple[dict[int, tuple[int, tuple[int, ...]]], ...] = ({}, {})
            for pairs, used, found in (
                (slot.send, self._sent, place[0]),
                (slot.receive, self._taken, place[1]),
            ):
                for peer, shape in pairs if slot.kind == "halos" else ():
                    start = max(used[peer], self._statistics_size)
                    found[peer] = (start, shape)
                    used[peer] = start + prod(shape) * itemsize
            places.append(place)
        width = -(-max(*self._sent, *self._taken, self._statistics_size, _ALIGN) // _ALIGN) * _ALIGN

        def rows() -> torch.Tensor:
            return torch.zeros((ranks, width), dtype=torch.uint8, device=device)

        self._outbox = rows()
        received = rows()
        predicts = bool(self._statistics_weight or self._prediction.halos)
        self._small: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] = (
            (received, rows(), rows()) if predicts else (received, None, None)
        )
        values = received if self._small[1] is None else self._small[1]

        def statistics(rows: torch.Tensor) -> list[torch.Tensor]:
            return [
                rows[:, start : start + size].view(torch.float32).view(ranks, *slot.send[0][1])
                if size
                else rows
                for slot, start, size in zip(self._slots, offsets, sizes, strict=False)
            ]

        def halo_views(rows: torch.Tensor, side: int) -> list[dict[int, torch.Tensor]]:
            return [
                {
                    peer: rows[peer, at : at + prod(shape) * itemsize].view(self._halo_dtype).view(shape)
                    for peer, (at, shape) in place[side].items()
                }
                for place in places
            ]

        self._outbox_statistics, self._outbox_halos = statistics(self._outbox), halo_views(self._outbox, 0)
        self._received_statistics, self._received_halos = statistics(received), halo_views(received, 1)
        self._statistics, self._inbox_halos = statistics(values), halo_views(values, 1)

    def _lay_out_keys_values(self) -> None:
        """One buffer per level, (tokens, width), with each slot's columns side by side."""
        self._received_keys_values: list[torch.Tensor] = [torch.empty(0)] * len(self._slots)
        self._keys_values: list[torch.Tensor] = [torch.empty(0)] * len(self._slots)
        self._wide: list[tuple[tuple[int, ...], torch.Tensor, torch.Tensor | None, torch.Tensor | None]] = []
        slots = [(at, s) for at, s in enumerate(self._slots) if s.kind == "keys_values"]
        for tokens in dict.fromkeys(slot.extents for _, slot in slots):
            members = [(at, slot) for at, slot in slots if slot.extents == tokens]
            widths = [prod(slot.send[0][1][1:]) for _, slot in members]
            offsets = [0, *accumulate(widths)]

            def buffer(like: Slot = members[0][1], width: int = offsets[-1]) -> torch.Tensor:
                return torch.zeros(
                    (sum(like.extents), width), dtype=like.dtype, device=self._communicator.device
                )

            received = buffer()
            predicts = bool(self._prediction.keys_values)
            values, previous = (buffer(), buffer()) if predicts else (None, None)
            self._wide.append((tokens, received, values, previous))
            for (at, slot), start, width in zip(members, offsets, widths, strict=False):
                for target, source in (
                    (self._received_keys_values, received),
                    (self._keys_values, received if values is None else values),
                ):
                    target[at] = source[:, start : start + width].unflatten(1, slot.send[0][1][1:])
                if values is None:
                    self._keys_values[at] = self._received_keys_values[at]

    def _statistics_bytes(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, : self._statistics_size].view(torch.float32)

    def _halo_bytes(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, self._statistics_size :].view(self._halo_dtype)

    @staticmethod
    def _arrays(arrays: object) -> list[torch.Tensor | None]:
        if isinstance(arrays, list):
            return [t for group in arrays for t in group[1:]]
        assert isinstance(arrays, tuple)
        return list(arrays)


def _extrapolate(previous: torch.Tensor, last: torch.Tensor, out: torch.Tensor, weight: float) -> None:
    if weight == 0.0:
        out.copy_(last)
    else:
        torch.lerp(previous, last, 1.0 + weight, out=out)
