"""Few launches: what a displaced step asks of a GPU stays near to what diffusers alone asks."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from bench.launches import alone_of, share
from bench.published import PUBLISHED

SDXL = PUBLISHED["sdxl"]


@pytest.mark.sweep
@pytest.mark.parametrize(("split", "most"), [(True, 1.0), (False, 1.05)])
def test_a_displaced_step_launches_and_moves_little_more_than_without_an_exchange(
    split: bool, most: float
) -> None:
    alone = alone_of(SDXL, 1024)
    (none, *_), (displaced, peers, buffers) = (
        share(SDXL, 1024, 8, split, mode) for mode in ("none", "displaced")
    )
    assert none.launches < displaced.launches <= most * alone.launches
    assert none.nbytes < displaced.nbytes <= 1.15 * none.nbytes
    sent = [moment.sent for moment, _ in peers.marks if moment.kind == "launch"]
    assert len(sent) == 11 and buffers > 4e8


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("name", "blocks", "tokens", "width"), [("flux", 57, 4608, 3072), ("qwen-image", 60, 4224, 3072)]
)
def test_a_transformer_sends_what_arithmetic_says(name: str, blocks: int, tokens: int, width: int) -> None:
    model, ranks = PUBLISHED[name], 8
    sent = {}
    for attention in ("gather", "ulysses"):
        _, peers, _ = share(model, 1024, ranks, False, "sync", attention)
        messages = [moment.sent for moment, _ in peers.marks if moment.kind == "launch"]
        *of_blocks, _ = (sum(bytes_.values()) for bytes_ in messages)  # the last is the output
        sent[attention] = sum(of_blocks)
        assert len(of_blocks) == blocks * (1 if attention == "gather" else 2)
    keys_values = blocks * 2 * (tokens // ranks) * width * 2  # bfloat16
    assert sent == {"gather": keys_values * (ranks - 1), "ulysses": keys_values * (ranks - 1) * 2 // ranks}
