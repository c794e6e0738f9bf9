"""Messages that carry a group norm's statistics and the rows of its input around a patch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod

import torch

from distriray.parallel.exchange.slots import aligned


class StatisticsAndRows:
    """One message to each peer and one from it: statistics for all, behind them rows for those that need any.

    Args:
        rank: this rank.
        shape: of the statistics of all ranks, (ranks, batch, groups, 2).
        rows: what is sent to a peer besides.
        room: tensors like those that are received from a peer besides.
        device: of all of them.

    Attributes:
        statistics: float32, of `shape`. This rank fills its row before it `sends`; the others' arrive.
        rows: what is received besides, by peer.
        receives: room for the messages, as `Communicator.exchange` takes it.
    """

    def __init__(
        self,
        rank: int,
        shape: tuple[int, ...],
        rows: Mapping[int, torch.Tensor],
        room: Mapping[int, torch.Tensor],
        device: torch.device,
    ) -> None:
        self._peers = [peer for peer in range(shape[0]) if peer != rank]
        self._sent = rows
        self._nbytes = 4 * prod(shape[1:])
        self._head = aligned(self._nbytes)
        inbox = self._messages(shape[0], room.values(), device)
        self.statistics = self._statistics(inbox).view(shape)
        self._own = self.statistics[rank]
        self.rows = {peer: self._rows(inbox[peer], tensor) for peer, tensor in room.items()}
        self.receives = {peer: self._message(inbox[peer], room.get(peer)) for peer in self._peers}

    def sends(self) -> dict[int, torch.Tensor]:
        """The messages, as `Communicator.exchange` takes them."""
        outbox = self._messages(len(self._sent), self._sent.values(), self._own.device)
        self._statistics(outbox).copy_(self._own.flatten().expand(len(outbox), -1))
        sends = dict.fromkeys(self._peers, self._own)
        for (peer, tensor), message in zip(self._sent.items(), outbox, strict=True):
            self._rows(message, tensor).copy_(tensor)
            sends[peer] = self._message(message, tensor)
        return sends

    def _messages(self, count: int, behind: Collection[torch.Tensor], device: torch.device) -> torch.Tensor:
        """Room for messages, the longest of which has the longest of these behind its statistics."""
        longest = max((tensor.nbytes for tensor in behind), default=0)
        return torch.empty((count, self._head + aligned(longest)), dtype=torch.uint8, device=device)

    def _statistics(self, messages: torch.Tensor) -> torch.Tensor:
        return messages[:, : self._nbytes].view(torch.float32)

    def _rows(self, message: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return message[self._head : self._head + like.nbytes].view(like.dtype).view(like.shape)

    def _message(self, message: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        return message[: self._nbytes if rows is None else self._head + rows.nbytes]
