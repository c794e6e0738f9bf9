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
        targets, sources, sent = [], [], list(sends.values())
        for target in receives.values():
            source = _like(target, sent)
            if source is not None:
                targets.append(target)
                sources.append(source)
            elif target.is_floating_point():
                target.zero_()  # bytes without a counterpart are a random state, which stays the own one
        if targets:
            torch._foreach_copy_(targets, sources)  # on a GPU one launch for all, as a real transfer is


def _like(tensor: torch.Tensor, sends: list[torch.Tensor]) -> torch.Tensor | None:
    """Values for all of `tensor` from the first that is sent in its dtype; None if nothing is."""
    like = next((sent for sent in sends if sent.dtype == tensor.dtype and sent.numel()), None)
    if like is None or not tensor.numel():
        return None
    times = -(-tensor.numel() // like.numel())
    values = like.flatten()
    return (values if times == 1 else values.repeat(times))[: tensor.numel()].view_as(tensor)
