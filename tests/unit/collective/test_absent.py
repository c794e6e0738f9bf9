"""Peers that are absent send what a rank's own values look like, and never garbage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from distriray.collective.absent import AbsentPeers

PEERS = AbsentPeers(1, 2, torch.device("cpu"))


@pytest.mark.parametrize("looked_at", [dict, PEERS.messages])
def test_what_is_received_is_of_the_kind_that_is_sent_or_nothing(looked_at: Callable[..., Any]) -> None:
    half, sent = torch.full((2,), 1.5, dtype=torch.float16), torch.tensor([1.5, 2.5])
    for sends, wanted in (({}, [0.0] * 3), ({0: half}, [0.0] * 3), ({0: sent}, [1.5, 2.5, 1.5])):
        received = torch.full((3,), float("nan"))
        PEERS.exchange(looked_at(sends), looked_at({0: received})).wait()
        assert received.tolist() == wanted


def test_what_one_transfer_brings_is_copied_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, copy = [], torch._foreach_copy_

    def noted(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        calls.append(len(targets))
        copy(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", noted)
    sent = torch.arange(6.0).view(2, 3)
    received = {
        peer: torch.full((length,), float("nan")) for peer, length in ((1, 6), (2, 4), (3, 0), (4, 8))
    }
    AbsentPeers(0, 5, torch.device("cpu")).exchange(dict.fromkeys(received, sent), received).wait()
    assert calls == [3]
    assert received[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert received[2].tolist() == [0, 1, 2, 3]
    assert received[4].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
