"""One rank of a gang whose other ranks are not there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from bench.barrier import finish
from distriray.collective.messages import as_messages, peers_of
from distriray.collective.subgroup import Subgroup
from distriray.errors import GangBroken
from distriray.parallel.gather import HEADER
from distriray.parallel.stopwatch import Mark, mark, seconds_between


@dataclass
class Moment:
    """Something that a rank does within a step: it starts a transfer, or waits for one.

    Attributes:
        transfer: number of the transfer, counted over all steps.
        at_s: seconds since the step began.
        sent: bytes that leave in it, by peer; empty for a wait.
    """

    kind: Literal["launch", "wait"]
    transfer: int
    at_s: float
    sent: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One step of one rank, with peers that answer at once."""

    seconds: float
    moments: list[Moment]

    @property
    def sent(self) -> dict[int, int]:
        """Bytes by peer."""
        total: Counter[int] = Counter()
        for moment in self.moments:
            total.update(moment.sent)
        return dict(total)


class AbsentPeers:
    """Rank `rank` of `world_size`; whatever it receives is there at once.

    While `fills`, a peer sends what this rank sends (with nothing like it at hand, zeros): values of the
    right size, so that no later arithmetic meets garbage. Else what was received stays as it is, as if
    the peers' activations did not change, but for the headers of gathers, which are always this rank's own.
    A transfer costs the rank no time, that is for a model of the link to add, and what filling takes is left
    out. Every transfer is noted, with its bytes and its time within the step.
    """

    backend = "none"

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.peers = peers_of(rank, world_size)
        self.device = device
        self.bytes_sent = 0
        self.broken = False
        self.fills = True
        self._transfers = 0
        self._began: Mark = 0.0
        self.marks: list[tuple[Moment, Mark]] = []
        self._filling: list[tuple[Mark, Mark]] = []

    def begin_step(self) -> None:
        finish(self.device)
        self.marks, self._filling = [], []
        self._began = mark(self.device)

    def end_step(self) -> Step:
        ended = mark(self.device)
        finish(self.device)
        filled = [tuple(seconds_between(self._began, end) for end in ends) for ends in self._filling]

        def at(reached: Mark) -> float:
            moment = seconds_between(self._began, reached)
            return moment - sum(until - since for since, until in filled if until <= moment)

        for moment, reached in self.marks:
            moment.at_s = at(reached)
        return Step(at(ended), [moment for moment, _ in self.marks])

    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> AbsentWork:
        sent = {
            peer: flat.nbytes for peer, flat in as_messages(sends, self.rank, self.world_size, self.device)
        }
        as_messages(receives, self.rank, self.world_size, self.device)
        if self.fills:
            since = mark(self.device)
            for tensor in receives.values():
                _fill(tensor, list(sends.values()))
            self._filling.append((since, mark(self.device)))
        elif len({id(flat) for flat in sends.values()}) == 1:
            for peer, message in receives.items():
                if message.dtype == torch.uint8:
                    message[:HEADER].copy_(sends[peer][:HEADER])
        self.bytes_sent += sum(sent.values())
        self._transfers += 1
        self.note(Moment("launch", self._transfers, 0.0, sent))
        return AbsentWork(self, self._transfers)

    def check(self) -> None:
        if self.broken:
            raise GangBroken("the rank whose peers are absent gave up")

    def note(self, moment: Moment) -> None:
        self.marks.append((moment, mark(self.device)))

    def subgroup(self, ranks: Sequence[int]) -> Subgroup:
        return Subgroup(self, ranks)

    def abort(self) -> None:
        self.broken = True

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class AbsentWork:
    """A transfer that was over before it began; that somebody waits for it is noted."""

    owner: AbsentPeers
    transfer: int

    def wait(self) -> None:
        self.owner.note(Moment("wait", self.transfer, 0.0))


def _fill(tensor: torch.Tensor, sends: list[torch.Tensor]) -> None:
    like = next((sent for sent in sends if sent.dtype == tensor.dtype and sent.numel()), None)
    if like is not None and tensor.numel():
        times = -(-tensor.numel() // like.numel())
        tensor.copy_(like.flatten().repeat(times)[: tensor.numel()].view_as(tensor))
    elif tensor.is_floating_point():
        tensor.zero_()  # bytes without a counterpart are a random state, which stays the own one
