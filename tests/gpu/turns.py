"""Gangs of runners that take turns: one device is enough for all of them."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from distriray.collective import Communicator, LockstepCommunicator, connect
from distriray.collective.lockstep import Gang
from distriray.gang import runner
from distriray.gang.messages import RankResult, SegmentOrder
from distriray.gang.runner import SegmentRunner


class Rank(LockstepCommunicator):
    """One that is closed while it is nobody's turn."""

    def close(self) -> None:
        with self.gang.turn:
            super().close()


class Turns:
    """The gangs of all workers, by name, in place of connections. Lone workers take turns too."""

    def __init__(self) -> None:
        self._gangs: dict[str, Gang] = {}
        self._alone = threading.Lock()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take effect until the test is over."""
        run = SegmentRunner.run

        def in_turn(segments: SegmentRunner, order: SegmentOrder, *args: Any) -> RankResult:
            communicator = segments._communicators[order.communicator]
            with communicator.gang.turn if isinstance(communicator, Rank) else self._alone:
                return run(segments, order, *args)

        monkeypatch.setattr(SegmentRunner, "run", in_turn)
        monkeypatch.setattr(runner, "connect", self.connect)

    def connect(
        self, *, rank: int, world_size: int, device: torch.device, name: str, **_: Any
    ) -> Communicator:
        """As `distriray.collective.connect`."""
        if world_size == 1:
            return connect(device=device)
        return Rank(self._gangs.setdefault(name, Gang(world_size)), rank, device)
