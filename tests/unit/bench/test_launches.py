"""Few launches: what a displaced step asks of a GPU stays near to what diffusers alone asks."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from bench.launches import alone_of, share


@pytest.mark.sweep
def test_a_displaced_step_launches_and_moves_little_more_than_without_an_exchange() -> None:
    alone = alone_of(1024)
    (none, *_), (displaced, peers, buffers) = (share(1024, 8, True, mode) for mode in ("none", "displaced"))
    assert none.launches < displaced.launches <= 1.05 * alone.launches
    assert none.nbytes < displaced.nbytes <= 1.15 * none.nbytes
    sent = [moment.sent for moment, _ in peers.marks if moment.kind == "launch"]
    assert len(sent) == 11 and buffers > 4e8
