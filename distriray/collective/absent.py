"""One rank of a gang whose other ranks are not there, to rehearse its part alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from distriray.collective.backend import BackendCommunicator
from distriray.collective.base import Work
from distriray.collective.local import NothingInFlight
from distriray.collective.messages import Messages, as_messages


class AbsentPeers(BackendCommunicator):
    """Rank `rank` of `world_size`; whatever it receives is there at once.

    A peer sends what this rank sends (with nothing like it at hand, zeros): values of the right size, by
    which a rank agrees with itself, and no later arithmetic meets garbage.
    """

    backend = "none"

    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> Work:
        self.check()
        messages = as_messages(sends, self.rank, self.world_size, self.device)
        self._bytes_sent += sum(flat.nbytes for _, flat in messages)
        as_messages(receives, self.rank, self.world_size, self.device)
        self._receive(*(of.tensors if isinstance(of, Messages) else of for of in (sends, receives)))
        return NothingInFlight()

    def _receive(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> None:
        for tensor in receives.values():
            _fill(tensor, list(sends.values()))


def _fill(tensor: torch.Tensor, sends: list[torch.Tensor]) -> None:
    like = next((sent for sent in sends if sent.dtype == tensor.dtype and sent.numel()), None)
    if like is not None and tensor.numel():
        times = -(-tensor.numel() // like.numel())
        tensor.copy_(like.flatten().repeat(times)[: tensor.numel()].view_as(tensor))
    elif tensor.is_floating_point():
        tensor.zero_()  # bytes without a counterpart are a random state, which stays the own one
