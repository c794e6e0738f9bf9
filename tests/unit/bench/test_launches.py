"""Few launches: what a displaced step asks of a GPU stays near to what diffusers alone asks."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from bench.launches import RANK, alone_of, by_diffusers, on_meta, share
from bench.published import PUBLISHED, Published
from distriray.config import AttentionMode
from distriray.parallel.partition import dealt_heads
from tests.parameters import sweep

SDXL = PUBLISHED["sdxl"]


@pytest.mark.sweep
@pytest.mark.parametrize(("split", "launches", "moves"), [(True, 1.0, 1.1), (False, 1.0, 1.15)])
def test_a_displaced_step_launches_and_moves_little_more_than_without_an_exchange(
    split: bool, launches: float, moves: float
) -> None:
    alone = alone_of(SDXL, 1024)
    (none, *_), (displaced, peers, buffers) = (
        share(SDXL, 1024, 8, split, mode) for mode in ("none", "displaced")
    )
    assert none.launches < displaced.launches <= launches * alone.launches
    assert none.nbytes < displaced.nbytes <= moves * none.nbytes
    sent = [moment.sent for moment, _ in peers.marks if moment.kind == "launch"]
    assert len(sent) == 11 and buffers > 4e8


@pytest.mark.sweep
def test_changes_in_few_bits_take_a_launch_to_encode_and_one_a_peer_to_decode() -> None:
    (exact, *_), (compressed, peers, _) = (
        share(SDXL, 1024, 8, True, mode) for mode in ("sync", "compressed")
    )
    attentions, others = 70, 3  # guidance is split: four patches
    assert compressed.launches == exact.launches + attentions * (1 + others)
    assert compressed.nbytes <= 1.2 * exact.nbytes
    sent = sum(sum(moment.sent.values()) for moment, _ in peers.marks if moment.kind == "launch")
    assert sent < 1e8


LAYERS = ((10, 64**2, 640, 10), (60, 32**2, 1280, 20))
"""Of SDXL's attention to the whole image, at 1024x1024: layers, tokens, channels and heads."""


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("split", "attention", "most"), [(True, "ulysses", 0.52), (False, "ulysses", 0.28), (False, "auto", 0.46)]
)
def test_a_step_of_sdxl_that_deals_heads_sends_what_arithmetic_says(
    split: bool, attention: AttentionMode, most: float
) -> None:
    ranks, patches, batch = 8, 4 if split else 8, 1 if split else 2
    rank = RANK % patches
    (gathered, of_gathered, _), (dealing, of_dealing, _) = (
        share(SDXL, 1024, ranks, split, "sync", way) for way in ("gather", attention)
    )
    saved = messages = 0
    for layers, tokens, channels, heads in LAYERS:
        deals = dealt_heads(attention, heads, patches)
        if deals is None:
            continue
        own = tokens // patches * batch * 2  # float16
        gather = (patches - 1) * own * 2 * channels
        of_others = heads - deals[rank]
        there, back = 3 * own * of_others, (patches - 1) * own * deals[rank]
        saved += layers * (gather - (there + back) * channels // heads)
        messages += layers
    sent, less = (
        [sum(moment.sent.values()) for moment, _ in peers.marks if moment.kind == "launch"]
        for peers in (of_gathered, of_dealing)
    )
    assert (sum(sent) - sum(less), len(less) - len(sent)) == (saved, messages)
    assert sum(less) < most * sum(sent)
    assert dealing.launches <= gathered.launches + 4 * messages
    assert dealing.nbytes <= 1.03 * gathered.nbytes


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
    calls, sent = max(1, len(model.branches)), {}
    for attention in ("gather", "ulysses"):
        _, peers, _ = share(model, 1024, ranks, False, "sync", attention)
        messages = [moment.sent for moment, _ in peers.marks if moment.kind == "launch"]
        *of_blocks, output = (sum(bytes_.values()) for bytes_ in messages)
        sent[attention] = sum(of_blocks) - (calls - 1) * output
        assert len(of_blocks) + 1 == calls * (1 + blocks * (1 if attention == "gather" else 2))
    keys_values = calls * blocks * 2 * (tokens // ranks) * width * 2  # bfloat16
    assert sent == {"gather": keys_values * (ranks - 1), "ulysses": keys_values * (ranks - 1) * 2 // ranks}


def test_a_short_step_asks_for_one_block_however_many_there_are() -> None:
    (three, _), (two, _) = shallow("flux", 3), shallow("flux", 2)
    (ours, peers, _), (theirs, others, _) = (
        share(model, 1024, 8, False, "sync", "auto", short=True) for model in (three, two)
    )
    whole, of_whole, _ = share(two, 1024, 8, False, "sync", "auto")
    assert (ours.launches, ours.nbytes) == (theirs.launches, theirs.nbytes)
    waits = [sum(moment.kind == "launch" for moment, _ in each.marks) for each in (peers, others, of_whole)]
    assert waits == [3, 3, 9], "heads of a block are dealt in two messages, and the output is gathered"
    assert ours.launches < whole.launches and ours.nbytes < whole.nbytes / 2


def test_heads_that_ranks_do_not_divide_are_sent_once_too_and_cost_three_launches_a_layer() -> None:
    model, ranks, heads, channels = PUBLISHED["z-image"], 8, 30, 128
    (gathered, *_), (dealt, peers, _) = (
        share(model, 1024, ranks, False, "sync", attention) for attention in ("gather", "ulysses")
    )
    messages = [moment.sent for moment, _ in peers.marks if moment.kind == "launch"]
    *of_layers, _ = (sum(bytes_.values()) for bytes_ in messages)
    joint, image, own = 30, 2, 4  # layers over text and image, and over the image; heads of this rank
    tokens = (joint * (4096 + 128) + image * 4096) // ranks
    projections, attended = 3 * tokens * (heads - own), (ranks - 1) * tokens * own
    assert sum(of_layers) == 2 * channels * (projections + attended)  # bfloat16
    assert len(of_layers) == 2 * (joint + image)
    assert dealt.launches - gathered.launches == 3 * (joint + image)


@pytest.mark.parametrize("name", sweep(DEPTHS))
def test_a_block_asks_less_of_a_gpu_than_by_diffusers_own_parallelism_in_half_the_messages(name: str) -> None:
    (three, blocks), (two, fewer) = shallow(name, 3), shallow(name, 2)
    ours, theirs = (
        [more - less for more, less in zip(*both, strict=True)]
        for both in zip(asked(three), asked(two), strict=True)
    )
    assert ours[0] < theirs[0] and ours[1] < theirs[1] and ours[2] == theirs[2]
    calls = max(1, len(three.branches))
    assert (ours[3], theirs[3]) == (2 * calls * (blocks - fewer), 4 * calls * (blocks - fewer))


def test_halves_that_have_a_branch_each_launch_and_wait_half_as_often() -> None:
    model, blocks = shallow("qwen-image")
    (half, of_half, _), (both, of_both, _) = (
        share(model, 1024, 8, split, "sync", "ulysses") for split in (True, False)
    )
    waits = [sum(moment.kind == "launch" for moment, _ in peers.marks) for peers in (of_half, of_both)]
    assert waits == [2 * blocks + 1, 2 * (2 * blocks + 1)]
    assert 2 * half.launches < 1.02 * both.launches


def asked(model: Published) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Launches, bytes moved, bytes sent and messages of one rank of eight: of a gang, and of diffusers."""
    count, peers, _ = share(model, 1024, 8, False, "sync", "ulysses")
    sent = [sum(moment.sent.values()) for moment, _ in peers.marks if moment.kind == "launch"]
    theirs = by_diffusers(model, 1024, 8)
    assert theirs is not None
    their_count, to_each = theirs
    ours = count.launches, count.nbytes, sum(sent), len(sent)
    return ours, (their_count.launches, their_count.nbytes, 7 * sum(to_each), len(to_each))
