"""Few launches: what a displaced step asks of a GPU stays near to what diffusers alone asks."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from bench.launches import alone_of, by_diffusers, on_meta, share
from bench.published import PUBLISHED, Published
from tests.parameters import sweep

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


DEPTHS = {"flux": {"num_layers": 19, "num_single_layers": 38}, "qwen-image": {"num_layers": 60}}


def shallow(name: str, depth: int = 2) -> tuple[Published, int]:
    """A network with so many blocks of each kind, since the others are like them, and how many that are."""
    published, depths = PUBLISHED[name], DEPTHS[name]
    whole, _ = on_meta(published, 1024)
    assert {field: whole.config[field] for field in depths} == depths
    of_whole = {key: value for key, value in whole.config.items() if key[0] != "_"}
    config = of_whole | dict.fromkeys(depths, depth)
    return replace(published, make=lambda: type(whole)(**config)), depth * len(depths)


@pytest.mark.parametrize(
    ("name", "tokens", "width"), sweep([("flux", 4608, 3072), ("qwen-image", 4224, 3072)])
)
def test_a_transformer_sends_what_arithmetic_says(name: str, tokens: int, width: int) -> None:
    (model, blocks), ranks = shallow(name), 8
    sent = {}
    for attention in ("gather", "ulysses"):
        _, peers, _ = share(model, 1024, ranks, False, "sync", attention)
        messages = [moment.sent for moment, _ in peers.marks if moment.kind == "launch"]
        *of_blocks, _ = (sum(bytes_.values()) for bytes_ in messages)  # the last is the output
        sent[attention] = sum(of_blocks)
        assert len(of_blocks) == blocks * (1 if attention == "gather" else 2)
    keys_values = blocks * 2 * (tokens // ranks) * width * 2  # bfloat16
    assert sent == {"gather": keys_values * (ranks - 1), "ulysses": keys_values * (ranks - 1) * 2 // ranks}


@pytest.mark.parametrize("name", sweep(DEPTHS))
def test_a_block_asks_less_of_a_gpu_than_by_diffusers_own_parallelism_in_half_the_messages(name: str) -> None:
    ranks, launches, moved, sent, messages = 8, [], [], [], []
    for depth in (2, 3):
        model, blocks = shallow(name, depth)
        count, peers, _ = share(model, 1024, ranks, False, "sync", "ulysses")
        theirs = by_diffusers(model, 1024, ranks)
        assert theirs is not None
        their_count, to_each = theirs
        of_each = [sum(moment.sent.values()) for moment, _ in peers.marks if moment.kind == "launch"]
        launches.append((count.launches, their_count.launches))
        moved.append((count.nbytes, their_count.nbytes))
        sent.append((sum(of_each), sum(to_each) * (ranks - 1)))
        messages.append((len(of_each), len(to_each)))
    more = [[after - before for before, after in zip(*both, strict=True)] for both in (launches, moved, sent)]
    (own_launches, their_launches), (own_bytes, their_bytes), (own_sent, they_sent) = more
    assert own_launches < their_launches and own_bytes < their_bytes and own_sent == they_sent
    assert messages[1] == (2 * blocks + 1, 4 * blocks + 1)
