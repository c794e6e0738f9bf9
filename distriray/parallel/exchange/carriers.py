"""Carriers of fresh values: whole, or as residuals in few bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from distriray.parallel.exchange.residuals import Residuals
from distriray.parallel.exchange.slots import Slot

Values = Mapping[int, torch.Tensor]
"""By peer."""


class Carrier:
    """Takes the values of one slot after the other to the peers: whole.

    For each slot `pack`, `room` and `unpack` are called in this order.
    """

    def pack(self, slot: Slot, values: Values) -> dict[int, torch.Tensor]:
        """The tensor that is sent to each peer, contiguous, for these values."""
        return {peer: tensor.contiguous() for peer, tensor in values.items()}

    def room(self, slot: Slot, into: Values) -> dict[int, torch.Tensor]:
        """Room to receive what each peer sends; in place if values travel as they are.

        Args:
            into: where the values are to be.
        """
        return dict(into)

    def unpack(self, slot: Slot, arrived: Values) -> Values:
        """The values of each peer in what has arrived: there, or where they were to be."""
        return arrived

    def skip(self) -> None:
        """Let all slots be over: graphs stand for the layers."""


class _Reconstructing(Carrier):
    def __init__(self, residuals: Residuals) -> None:
        self._residuals = residuals

    def skip(self) -> None:
        self._residuals.skip()


class WholeAndKept(_Reconstructing):
    """Whole, and kept as the reconstructions that later residuals go on from.

    Args:
        bits: of a number of those.
    """

    def __init__(self, residuals: Residuals, bits: int) -> None:
        super().__init__(residuals)
        self._bits = bits

    def pack(self, slot: Slot, values: Values) -> dict[int, torch.Tensor]:
        self._sent = values
        return super().pack(slot, values)

    def unpack(self, slot: Slot, arrived: Values) -> Values:
        self._residuals.keep(slot, self._sent, arrived, self._bits)
        return arrived


class AsResiduals(_Reconstructing):
    """As the change since the last reconstruction."""

    def pack(self, slot: Slot, values: Values) -> dict[int, torch.Tensor]:
        sent, self._received = self._residuals.next(slot)
        alike = {residual: values[peer] for peer, residual in sent.items()}  # all peers may be sent the same
        messages = {residual: residual.encode(tensor) for residual, tensor in alike.items()}
        return {peer: messages[residual] for peer, residual in sent.items()}

    def room(self, slot: Slot, into: Values) -> dict[int, torch.Tensor]:
        self._into = into
        return {
            peer: tensor.new_empty(self._received[peer].message_bytes, dtype=torch.uint8)
            for peer, tensor in into.items()
        }

    def unpack(self, slot: Slot, arrived: Values) -> Values:
        for peer, message in arrived.items():
            self._received[peer].decode(message, self._into[peer])
        return self._into
