"""Carriers of fresh values: whole, or as changes in few bits."""

from __future__ import annotations

import torch

from distriray.parallel.exchange.reconstructions import Reconstructions
from distriray.parallel.exchange.slots import Slot, Values


class Carrier:
    """Takes the values of one slot after the other to the peers: whole.

    For each slot `pack`, `room` and `unpack` are called in this order.
    """

    def pack(self, slot: Slot, values: Values) -> Values:
        """The tensor that is sent to each peer for these values."""
        return values

    def room(self, slot: Slot, into: Values) -> Values:
        """Room to receive what each peer sends; in place if values travel as they are.

        Args:
            into: where the values are to be.
        """
        return into

    def unpack(self, slot: Slot, arrived: Values) -> Values:
        """The values of each peer in what has arrived: there, or where they were to be."""
        return arrived

    def skip(self) -> None:
        """Let all slots be over: graphs stand for the layers."""


class _Reconstructing(Carrier):
    def __init__(self, reconstructions: Reconstructions) -> None:
        self._reconstructions = reconstructions

    def skip(self) -> None:
        self._reconstructions.skip()


class WholeAndKept(_Reconstructing):
    """Whole, and kept as the reconstructions that later changes go on from.

    Args:
        bits: of a number of those.
    """

    def __init__(self, reconstructions: Reconstructions, bits: int) -> None:
        super().__init__(reconstructions)
        self._bits = bits

    def pack(self, slot: Slot, values: Values) -> Values:
        self._sent = values
        return super().pack(slot, values)

    def unpack(self, slot: Slot, arrived: Values) -> Values:
        self._reconstructions.keep(slot, self._sent, arrived, self._bits)
        return arrived


class AsChanges(_Reconstructing):
    """As the change since the last reconstruction."""

    def pack(self, slot: Slot, values: Values) -> Values:
        sent, self._received = self._reconstructions.next(slot)
        alike = {known: values[peer] for peer, known in sent.items()}  # all peers may be sent the same
        messages = {known: known.encode(tensor) for known, tensor in alike.items()}
        return {peer: messages[known] for peer, known in sent.items()}

    def room(self, slot: Slot, into: Values) -> Values:
        self._into = into
        return {
            peer: tensor.new_empty(self._received[peer].message_bytes, dtype=torch.uint8)
            for peer, tensor in into.items()
        }

    def unpack(self, slot: Slot, arrived: Values) -> Values:
        for peer, message in arrived.items():
            self._received[peer].decode(message, self._into[peer])
        return self._into
