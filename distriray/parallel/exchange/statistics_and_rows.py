"""Messages that carry a group norm's statistics and the rows of its input around a patch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from distriray.parallel.exchange.slots import aligned


class StatisticsAndRows:
    """One message to each peer and one from it: statistics for all, behind them rows for those that need any.

    Args:
        peers: the other ranks.
        own: this rank's statistics, float32 (batch, groups, 2).
        rows: what is sent to a peer besides.
        room: tensors like those that are received from a peer besides.

    Attributes:
        sends, receives: the messages, as `Communicator.exchange` takes them.
        rows: what is received besides, by peer.
    """

    def __init__(
        self,
        peers: tuple[int, ...],
        own: torch.Tensor,
        rows: Mapping[int, torch.Tensor],
        room: Mapping[int, torch.Tensor],
    ) -> None:
        self._own = own
        self._head = aligned(own.nbytes)
        self.sends = dict.fromkeys(peers, own)
        for peer, tensor in rows.items():
            message = self.sends[peer] = self._message(tensor)
            self._statistics(message).copy_(own)
            self._rows(message, tensor).copy_(tensor)
        self.receives = {peer: torch.empty_like(own) for peer in peers}
        self.rows: dict[int, torch.Tensor] = {}
        for peer, tensor in room.items():
            message = self.receives[peer] = self._message(tensor)
            self.rows[peer] = self._rows(message, tensor)

    def statistics(self, rank: int) -> torch.Tensor:
        """Statistics of all ranks once they arrived, and this rank's, float32 (ranks, batch, groups, 2)."""
        everyone = {rank: self._own, **{peer: self._statistics(m) for peer, m in self.receives.items()}}
        return torch.stack([everyone[peer] for peer in sorted(everyone)])

    def _message(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.empty(self._head + rows.nbytes, dtype=torch.uint8, device=rows.device)

    def _statistics(self, message: torch.Tensor) -> torch.Tensor:
        if message.dtype is not torch.uint8:
            return message
        return message[: self._own.nbytes].view(torch.float32).view(self._own.shape)

    def _rows(self, message: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return message[self._head :].view(like.dtype).view(like.shape)
