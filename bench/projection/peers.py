"""Notes of what a rank does whose peers are not there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from bench.barrier import finish
from distriray.collective.absent import AbsentPeers
from distriray.config import Kind, Mix
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


class NotedPeers(AbsentPeers):
    """Peers that are absent, and every transfer with them, noted with its bytes and its time within the step.

    Unless it `fills`, what was received stays as it is, as if the peers' activations did not change, but for
    the headers of gathers, which are always this rank's own where there are values. A transfer costs the rank
    no time, that is for a model of the link to add, and what filling takes is left out.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        super().__init__(rank, world_size, device)
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

    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> NotedWork:
        super().exchange(sends, receives)
        self._transfers += 1
        sent = {peer: tensor.nbytes for peer, tensor in sends.items() if tensor.nbytes}
        self.note(Moment("launch", self._transfers, 0.0, sent))
        return NotedWork(self, self._transfers)

    def note(self, moment: Moment) -> None:
        self.marks.append((moment, mark(self.device)))

    def _receive(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> None:
        if self.fills:
            since = mark(self.device)
            super()._receive(sends, receives)
            self._filling.append((since, mark(self.device)))
        elif self.device.type != "meta" and len({id(flat) for flat in sends.values()}) == 1:
            for peer, message in receives.items():
                if message.dtype == torch.uint8:
                    message[:HEADER].copy_(sends[peer][:HEADER])


def filled_once(mix: Mix | None) -> bool:
    """Whether peers that fill what is received in one step need not in later ones: only stale values last."""
    return mix is None or all(map(mix.is_stale, get_args(Kind)))


@dataclass(frozen=True)
class NotedWork:
    """A transfer that was over before it began; that somebody waits for it is noted."""

    owner: NotedPeers
    transfer: int

    def wait(self) -> None:
        self.owner.note(Moment("wait", self.transfer, 0.0))
