"""Buckets of the exchange: runs of consecutive slots whose messages travel together."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch

from distriray.collective.base import Communicator, Work
from distriray.config import Kind, Weights
from distriray.parallel.exchange.regions import (
    ChangingKeysValues,
    HaloRegion,
    KeysValuesRegion,
    Packing,
    Region,
    StatisticsRegion,
)
from distriray.parallel.exchange.slots import ALIGN, Slot, Values, aligned


class Bucket:
    """Buffers and transfers of consecutive slots.

    Statistics and halos of all slots form one flat message per peer; keys and values are one message per peer
    and level, received in place.

    Args:
        communicator: the ranks of the exchange.
        slots: consecutive ones, by their index within the step.
        weights: of extrapolation.
        keys_values_bits: of the changes that are sent of keys and values; None to send these whole.

    Attributes:
        first, last: index of the first and of the last slot.
        statistics, halos: the regions of these kinds.
        keys_values: the region of each slot of keys and values, by its index.
    """

    def __init__(
        self,
        communicator: Communicator,
        slots: Mapping[int, Slot],
        weights: Weights,
        keys_values_bits: int | None,
    ) -> None:
        self.first, self.last = min(slots), max(slots)
        self._communicator = communicator
        self._rank = communicator.rank
        self._peers = communicator.peers
        self._works: list[Work] = []
        self._under_way = False
        self._lay_out_flat(slots, weights)
        self._lay_out_keys_values(slots, weights, keys_values_bits)
        self._regions: list[Region] = [self.statistics, self.halos, *self._levels]
        self._region_of: dict[int, Region] = {
            **dict.fromkeys(_of_kind(slots, "statistics"), self.statistics),
            **dict.fromkeys(_of_kind(slots, "halos"), self.halos),
            **self.keys_values,
        }

    @property
    def nbytes(self) -> int:
        """Memory of the buffers."""
        flat = self._outbox.nbytes + self._inbox.nbytes
        predicted = self.statistics.prediction_bytes + self.halos.prediction_bytes
        return flat + predicted + sum(region.nbytes for region in self._levels)

    def region(self, index: int) -> Region:
        """The region that holds a slot."""
        return self._region_of[index]

    def launch(self) -> None:
        """Send this step's values, and receive the peers' for the next one, in the background."""
        self.statistics.pack()
        self.remember(read=True)
        exchange = self._communicator.exchange
        sends = {peer: self._outbox[peer, : self._sent[peer]] for peer in self._peers if self._sent[peer]}
        receives = {
            peer: self._inbox[peer, : self._received[peer]] for peer in self._peers if self._received[peer]
        }
        if sends or receives:
            self._works.append(exchange(sends, receives))
        for region in self._levels:
            self._works.append(exchange(*region.messages(self._peers)))
        self._under_way = True

    def wait(self) -> None:
        """Wait for the transfers in flight: received values may be read, this rank's own overwritten."""
        if not self._under_way:
            return
        self._under_way = False
        while self._works:
            self._works.pop(0).wait()
        for region in self._levels:
            region.arrive()

    def begin(self) -> None:
        """Begin an image."""
        for region in self._regions:
            region.begin()

    def remember(self, read: bool) -> None:
        """Before new values arrive, make the received ones, `read` or not, those of the step before."""
        for region in self._regions:
            region.remember(read)

    def predict(self, steps: int) -> None:
        """Make what layers read from what was received, `steps` of the image having come before."""
        for region in self._regions:
            region.predict(steps)

    def _lay_out_flat(self, slots: Mapping[int, Slot], weights: Weights) -> None:
        """One row of bytes per rank: all statistics first, then the halos that this pair of ranks swaps."""
        ranks, device = self._communicator.world_size, self._communicator.device
        statistics, halos = _of_kind(slots, "statistics"), _of_kind(slots, "halos")
        dtype = next((slot.dtype for slot in halos.values()), torch.float32)
        sent = Packing({index: slot.send for index, slot in halos.items()}, ranks)
        received = Packing({index: slot.receive for index, slot in halos.items()}, ranks)
        head = aligned(StatisticsRegion.row_bytes(statistics))
        self._sent, self._received = (
            [head + dtype.itemsize * length for length in packing.lengths] for packing in (sent, received)
        )
        width = aligned(max(*self._sent, *self._received, ALIGN))
        self._outbox, self._inbox = (
            torch.zeros((ranks, width), dtype=torch.uint8, device=device) for _ in range(2)
        )
        self.statistics = StatisticsRegion(
            statistics,
            self._outbox[:, :head].view(torch.float32),
            self._inbox[:, :head].view(torch.float32),
            self._rank,
            weights.statistics,
        )
        self.halos = HaloRegion(
            sent,
            received,
            self._outbox[:, head:].view(dtype),
            self._inbox[:, head:].view(dtype),
            self._rank,
            weights.halos,
        )

    def _lay_out_keys_values(self, slots: Mapping[int, Slot], weights: Weights, bits: int | None) -> None:
        self._levels: list[KeysValuesRegion] = []
        self.keys_values: dict[int, KeysValuesRegion] = {}
        attentions = _of_kind(slots, "keys_values")
        for tokens in dict.fromkeys(slot.extents for slot in attentions.values()):
            level = {index: slot for index, slot in attentions.items() if slot.extents == tokens}
            where = self._communicator.device, self._rank, weights.keys_values
            region = (
                KeysValuesRegion(level, *where) if bits is None else ChangingKeysValues(level, *where, bits)
            )
            self._levels.append(region)
            self.keys_values |= dict.fromkeys(level, region)


class Buckets:
    """All slots of a step, dealt to buckets.

    Args:
        communicator: the ranks of the exchange.
        slots: in order.
        values: what the slots have moved, by rank; given back slot by slot as the buckets fill.
        count: buckets; one a slot where there are fewer slots.
        weights: of extrapolation.
        keys_values_bits: of the changes that are sent of keys and values; None to send these whole.
    """

    def __init__(
        self,
        communicator: Communicator,
        slots: list[Slot],
        values: list[Values],
        count: int,
        weights: Weights,
        keys_values_bits: int | None = None,
    ) -> None:
        self.slots = slots
        self._buckets: list[Bucket] = []
        self._of_slot: list[Bucket] = []
        count = min(count, len(slots))
        bounds = [len(slots) * i // count for i in range(count + 1)] if slots else []
        for first, stop in pairwise(bounds):
            bucket = Bucket(
                communicator, {i: slots[i] for i in range(first, stop)}, weights, keys_values_bits
            )
            self._buckets.append(bucket)
            for index in range(first, stop):
                self._of_slot.append(bucket)
                bucket.region(index).store(index, values[index])
                values[index] = {}

    def __getitem__(self, index: int) -> Bucket:
        """The bucket of a slot."""
        return self._of_slot[index]

    def region(self, index: int) -> Region:
        """The region of a slot."""
        return self._of_slot[index].region(index)

    def has(self, index: int, slot: Slot) -> bool:
        """Whether `slot` is the one at `index`."""
        if index >= len(self.slots):
            return False
        known = self.slots[index]
        return known is slot or known == slot  # slots are cached, so nearly always the same object

    @property
    def measured_kind(self) -> Kind:
        """The kind of value whose change is the drift."""
        return "keys_values" if any(slot.kind == "keys_values" for slot in self.slots) else "statistics"

    @property
    def nbytes(self) -> int:
        """Memory of the buffers."""
        return sum(bucket.nbytes for bucket in self._buckets)

    def begin(self) -> None:
        """Begin an image."""
        for bucket in self._buckets:
            bucket.begin()

    def wait(self) -> None:
        """Wait for the transfers in flight."""
        for bucket in self._buckets:
            bucket.wait()


def _of_kind(slots: Mapping[int, Slot], kind: Kind) -> dict[int, Slot]:
    return {index: slot for index, slot in slots.items() if slot.kind == kind}
