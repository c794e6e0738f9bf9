"""Fresh values in few bits: what has changed since the last reconstruction, quantized.

Sender and receivers hold the same reconstruction of a message. A step sends the difference of the new values
from it, and both sides add what was sent. So the error of one step is part of the next step's difference
(error feedback; Seide et al. 2014), and activations, which change little from step to step, need few bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from distriray.parallel.exchange.slots import LAYERS_CHANGED, Slot
from distriray.parallel.kernels.choice import kernels_of
from distriray.parallel.kernels.few_bits import message_bytes


class Reconstruction:
    """The reconstruction of one message.

    Args:
        values: what both sides know, contiguous; written in place.
        bits: of a quantized number, 2, 4 or 8.
    """

    def __init__(self, values: torch.Tensor, bits: int) -> None:
        self.values = values
        self._bits = bits
        self._kernels = kernels_of(values.device.type)

    @property
    def message_bytes(self) -> int:
        """Of a message."""
        return message_bytes(self.values.numel(), self._bits)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """The message, uint8, that brings this reconstruction nearer to `values`, at both ends."""
        if not self.values.numel():  # of a rank without tokens of the text, say
            return values.new_empty(0, dtype=torch.uint8)
        return self._kernels.encode(values, self.values, self._bits)

    def decode(self, message: torch.Tensor, into: torch.Tensor | None = None) -> None:
        """Have the reconstruction that the sender has after it has sent `message`.

        Args:
            into: where it goes too.
        """
        if self.values.numel():
            self._kernels.decode(message, self.values, self._bits, into)


class Reconstructions:
    """The reconstructions of an exchange, slot by slot in the order of a step."""

    def __init__(self) -> None:
        self._slots: list[Slot] = []
        self._ends: list[tuple[dict[int, Reconstruction], dict[int, Reconstruction]]] = []
        self._index = 0

    @property
    def nbytes(self) -> int:
        """Memory of all reconstructions."""
        held = {known for ends in self._ends for side in ends for known in side.values()}
        return sum(known.values.nbytes for known in held)

    def rewind(self) -> None:
        """Begin a step."""
        self._index = 0

    def keep(
        self, slot: Slot, sent: Mapping[int, torch.Tensor], received: Mapping[int, torch.Tensor], bits: int
    ) -> None:
        """Reconstruct the next slot's values, by peer, from themselves: they were swapped whole."""
        if self._slots[self._index : self._index + 1] != [slot]:
            del self._slots[self._index :], self._ends[self._index :]
            self._slots.append(slot)

            def made(values: torch.Tensor) -> Reconstruction:
                return Reconstruction(values.contiguous().clone(), bits)

            of_sent = {id(values): made(values) for values in sent.values()}
            self._ends.append(
                (
                    {peer: of_sent[id(values)] for peer, values in sent.items()},
                    {peer: made(values) for peer, values in received.items()},
                )
            )
        else:
            for side, values in zip(self._ends[self._index], (sent, received), strict=True):
                for peer, known in side.items():
                    known.values.copy_(values[peer])
        self._index += 1

    def next(self, slot: Slot) -> tuple[dict[int, Reconstruction], dict[int, Reconstruction]]:
        """The reconstructions of the next slot, of what is sent and of what is received, by peer.

        Raises:
            RuntimeError: the slot is not the one of the steps before.
        """
        if self._slots[self._index : self._index + 1] != [slot]:
            raise RuntimeError(LAYERS_CHANGED)
        self._index += 1
        return self._ends[self._index - 1]

    def skip(self) -> None:
        """Let all slots be over: graphs stand for the layers."""
        self._index = len(self._slots)

    def end(self, displaced: bool) -> None:
        """End a step.

        Raises:
            RuntimeError: a displaced one had fewer slots than the steps before.
        """
        if displaced and self._index < len(self._slots):
            raise RuntimeError(LAYERS_CHANGED)
        del self._slots[self._index :], self._ends[self._index :]
