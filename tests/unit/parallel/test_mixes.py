"""What each mix of fresh and stale values gives, and how often a step waits for it."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from distriray import ParallelConfig, parallelize
from distriray.collective import LockstepCommunicator, run_in_lockstep
from distriray.config import MIXES, PAPER, Mix, Weight
from distriray.errors import InvalidRequest
from distriray.parallel import StepStatistics, engine_of
from distriray.parallel.layers.conv import PatchConv2d
from distriray.parallel.layers.group_norm import PatchGroupNorm
from tests.models import tiny_sdxl_unet
from tests.parameters import sweep

INT4 = Mix(keys_values_width="int4")
INT8_HALOS = Mix(halos_width="int8", keys_values_width="int4")
STALE_INT4 = Mix(keys_values="stale", keys_values_width="int4")
FRESH_HALOS = Mix(statistics="stale", keys_values="stale")
FRESH_STATISTICS = Mix(halos="stale", keys_values="stale")
LOCAL = Mix(statistics="local")
ALL: list[Any] = [*MIXES, PAPER, INT4, INT8_HALOS, STALE_INT4, FRESH_HALOS, FRESH_STATISTICS, LOCAL]

INPUTS = {
    "encoder_hidden_states": torch.randn((2, 7, 32), generator=torch.Generator().manual_seed(1)),
    "added_cond_kwargs": {"text_embeds": torch.ones((2, 16)), "time_ids": torch.ones((2, 6))},
}


def sample(step: int, rows: int = 20) -> torch.Tensor:
    """Latents that change a little from step to step."""
    start, end = (torch.randn((2, 4, rows, 12), generator=torch.Generator().manual_seed(i)) for i in (2, 3))
    return start + 0.02 * step * end


def steps(
    unet: UNet2DConditionModel, communicator: Any, count: int = 3, rows: int = 20, **config: Any
) -> tuple[list[torch.Tensor], StepStatistics]:
    """The outputs of some steps of one image, and the figures of the last."""
    parallelize(unet, communicator, ParallelConfig(**{"cfg_parallel": False, **config}))
    engine = engine_of(unet)
    assert engine is not None
    with engine.image():
        outputs = [unet(sample(step, rows), 900.0 - step, **INPUTS).sample for step in range(count)]
    return outputs, engine.statistics


@cache
def gang(ranks: int, exchange: Any, warmup_steps: int = 1) -> list[tuple[list[torch.Tensor], StepStatistics]]:
    """What each rank has of three steps. Many tests ask for the same."""

    def rank(communicator: LockstepCommunicator) -> tuple[list[torch.Tensor], StepStatistics]:
        return steps(tiny_sdxl_unet(), communicator, exchange=exchange, warmup_steps=warmup_steps)

    return run_in_lockstep(ranks, rank)


@pytest.fixture(scope="module")
def alone() -> list[torch.Tensor]:
    unet = tiny_sdxl_unet()
    return [unet(sample(step), 900.0 - step, **INPUTS).sample for step in range(3)]


def error(outputs: list[torch.Tensor], alone: list[torch.Tensor], step: int) -> float:
    return float((outputs[step] - alone[step]).abs().max() / alone[step].abs().max())


@pytest.mark.parametrize("ranks", sweep([2, 3, 5]))
def test_fresh_values_of_every_kind_are_one_devices_numbers(ranks: int, alone: list[torch.Tensor]) -> None:
    for outputs, _ in gang(ranks, "sync"):
        assert all(error(outputs, alone, step) < 1e-5 for step in range(3))


@pytest.mark.parametrize("mix", sweep(ALL, first=len(MIXES)), ids=str)
def test_the_first_step_of_every_mix_is_exact_and_later_ones_are_near(
    mix: Any, alone: list[torch.Tensor]
) -> None:
    (outputs, statistics), (others, _) = gang(2, mix)
    assert all(map(torch.equal, outputs, others))
    assert error(outputs, alone, 0) < 1e-5
    assert statistics.synchronous == (mix == "sync")
    if mix != "sync":
        assert 1e-6 < error(outputs, alone, 2) < 0.3


def test_fresher_is_nearer(alone: list[torch.Tensor]) -> None:
    def off(mix: Any) -> float:
        return error(gang(2, mix)[0][0], alone, 2)

    errors = [off(mix) for mix in ("displaced", "displaced_attention", "compressed")]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert off(Mix(keys_values_width="int2")) > off(INT4) > off(Mix(keys_values_width="int8"))
    assert off(Mix(halos_width="int4")) > off(Mix(halos_width="int8"))


@pytest.mark.parametrize(
    ("mix", "warmup", "weights"),
    [
        (MIXES["displaced"], 4, ("fitted", "fitted", 0.0)),
        (PAPER, 4, (0.0, 0.0, 0.0)),  # which extrapolates nothing
        (MIXES["displaced_attention"], 4, (0.0, 0.0, 0.75)),
        (STALE_INT4, 4, (0.0, 0.0, 0.75)),
        (Mix(halos="stale"), 4, (0.0, "fitted", 0.0)),
        (MIXES["compressed"], 1, (0.0, 0.0, 0.0)),
        (MIXES["sync"], 1, (0.0, 0.0, 0.0)),
    ],
    ids=str,
)
def test_what_is_stale_has_its_warmup_and_extrapolation(
    mix: Mix, warmup: int, weights: tuple[Weight, ...]
) -> None:
    config = ParallelConfig(exchange=mix)
    assert config.warmup_of(mix) == warmup
    assert config.prediction.weights(mix) == weights


def test_the_papers_own_extrapolates_nothing_unless_asked() -> None:
    as_it_is, without, asked = (
        run_in_lockstep(2, partial(_paper, prediction=prediction))[0]
        for prediction in ({}, {"statistics": 0.0}, {"statistics": 0.5})
    )
    assert torch.equal(as_it_is, without) and not torch.equal(as_it_is, asked)


def _paper(communicator: LockstepCommunicator, prediction: dict[str, float]) -> torch.Tensor:
    """The third displaced step, the first that could be extrapolated by more than nothing."""
    config: dict[str, Any] = {"exchange": PAPER, "warmup_steps": 1, "prediction": prediction}
    return steps(tiny_sdxl_unet(), communicator, 4, **config)[0][-1]


def test_a_mix_of_every_kind_by_hand_is_the_one_with_the_name() -> None:
    for name, mix in MIXES.items():
        (by_name, _), (by_hand, _) = (gang(2, exchange)[0] for exchange in (name, mix))
        assert all(map(torch.equal, by_name, by_hand))


def many_heads() -> UNet2DConditionModel:
    """Layers of 5 heads and of 10, half as many as SDXL's."""
    return tiny_sdxl_unet(block_out_channels=(16, 40, 40), attention_head_dim=(1, 5, 10))


def by_heads(ranks: int, **config: Any) -> list[tuple[list[torch.Tensor], StepStatistics]]:
    """What each rank has of three steps of a U-Net with many heads."""

    def rank(communicator: LockstepCommunicator) -> tuple[list[torch.Tensor], StepStatistics]:
        return steps(many_heads(), communicator, **{"exchange": "sync", "warmup_steps": 1, **config})

    return run_in_lockstep(ranks, rank)


@pytest.fixture(scope="module")
def alone_with_many_heads() -> list[torch.Tensor]:
    unet = many_heads()
    return [unet(sample(step), 900.0 - step, **INPUTS).sample for step in range(3)]


LAYERS_OF_HEADS = {5: 3, 10: 8}


@pytest.mark.parametrize(
    ("ranks", "attention", "dealt"),
    sweep(
        [
            (4, "auto", [10]),  # of 5 heads, a rank would get two
            (3, "auto", [5, 10]),
            (5, "ulysses", [5, 10]),
            (4, "ulysses", [5, 10]),
            (2, "ulysses", [5, 10]),
            (2, "auto", []),  # it sends as much, in more messages
        ],
        first=2,
    ),
)
def test_heads_are_dealt_by_layers_and_give_one_devices_numbers(
    ranks: int, attention: Any, dealt: list[int], alone_with_many_heads: list[torch.Tensor]
) -> None:
    dealing = by_heads(ranks, attention=attention)
    for outputs, _ in dealing:
        assert all(error(outputs, alone_with_many_heads, step) < 1e-5 for step in range(3))
    (_, gathered), *_ = by_heads(ranks, attention="gather")
    more = dealing[0][1].waits - gathered.waits
    assert more == sum(LAYERS_OF_HEADS[heads] for heads in dealt)
    if ranks > 2:
        assert (dealing[0][1].bytes_sent < 0.9 * gathered.bytes_sent) == bool(dealt)


def test_each_half_of_a_gang_deals_the_heads_of_its_branch(alone_with_many_heads: list[torch.Tensor]) -> None:
    split, together = (by_heads(6, attention="ulysses", cfg_parallel=True), by_heads(3, attention="ulysses"))
    for outputs, statistics in split:
        assert all(error(outputs, alone_with_many_heads, step) < 1e-5 for step in range(3))
        assert statistics.waits == together[0][1].waits


@pytest.mark.parametrize(
    ("mix", "most"),
    sweep(
        [
            (Mix(statistics="stale", halos="stale"), 1e-5),
            (Mix(halos="stale"), 1e-5),
            (Mix(halos_width="int8"), 1e-3),  # numbers that hardly differ may be rounded apart
        ]
    ),
    ids=str,
)
def test_heads_are_dealt_wherever_keys_and_values_are_fresh_and_whole(mix: Mix, most: float) -> None:
    dealing, gathering = (by_heads(3, exchange=mix, attention=way)[0] for way in ("ulysses", "gather"))
    assert not dealing[1].synchronous
    assert dealing[1].waits - gathering[1].waits == sum(LAYERS_OF_HEADS.values())
    assert all(error(dealing[0], gathering[0], step) < most for step in range(3))


@pytest.mark.parametrize("mix", sweep(["displaced_attention", "displaced", "compressed", PAPER, STALE_INT4]))
def test_what_lasts_of_keys_and_values_is_gathered_in_every_step(mix: Any) -> None:
    dealing, gathering = (by_heads(3, exchange=mix, attention=way)[0] for way in ("ulysses", "gather"))
    assert all(map(torch.equal, dealing[0], gathering[0])) and dealing[1].waits == gathering[1].waits


def test_fewer_heads_than_ranks_are_refused_unless_nothing_is_exchanged() -> None:
    def rank(communicator: LockstepCommunicator, exchange: Any) -> None:
        steps(tiny_sdxl_unet(), communicator, count=1, exchange=exchange, attention="ulysses")

    with pytest.raises(InvalidRequest, match="2 heads to 3 ranks; use 'auto'"):
        run_in_lockstep(3, partial(rank, exchange="sync"))
    run_in_lockstep(3, partial(rank, exchange="none"))


def test_residuals_are_counted_and_begin_anew_with_every_image() -> None:
    def rank(communicator: LockstepCommunicator) -> tuple[list[list[torch.Tensor]], list[int]]:
        unet = tiny_sdxl_unet()
        images, held = [], []
        for mix in ("sync", INT8_HALOS, INT8_HALOS):
            images.append(steps(unet, communicator, exchange=mix, warmup_steps=1)[0])
            engine = engine_of(unet)
            assert engine is not None
            with engine.image():
                again = [unet(sample(step), 900.0 - step, **INPUTS).sample for step in range(3)]
            assert all(map(torch.equal, images[-1], again))
            held.append(engine.buffer_bytes)
        return images, held

    (_, (sync, first, second)), _ = run_in_lockstep(2, rank)
    assert sync < first == second


def test_stale_keys_and_values_in_few_bits_send_fewer_bytes() -> None:
    whole, few = (gang(2, mix)[0][1].bytes_sent for mix in (MIXES["displaced_attention"], STALE_INT4))
    assert few < 0.6 * whole


@pytest.mark.parametrize("statistics", ["stale", "corrected"])
def test_halos_in_few_bits_are_changes_of_what_displaced_steps_send(
    statistics: Any, alone: list[torch.Tensor]
) -> None:
    few, whole = (
        error(gang(2, Mix(statistics=statistics, halos_width=width))[0][0], alone, 1)
        for width in ("int4", "whole")
    )
    assert few < 1.5 * whole


def test_widths_that_nothing_sends_are_refused() -> None:
    with pytest.raises(ValueError, match="stale halos are sent whole"):
        Mix(halos="stale", halos_width="int8")


def sdxl_layers() -> UNet2DConditionModel:
    """All layers of SDXL's U-Net, narrow."""
    return tiny_sdxl_unet(
        layers_per_block=2, transformer_layers_per_block=(1, 2, 10), block_out_channels=(8, 16, 16)
    )


@pytest.mark.parametrize(
    ("mix", "published"),
    sweep([("displaced", 5), ("sync", 121), ("compressed", 121), ("displaced_attention", 55)]),
)
def test_a_step_of_sdxl_waits_as_seldom_as_is_published(mix: Any, published: int) -> None:
    def rank(communicator: LockstepCommunicator) -> int:
        return steps(sdxl_layers(), communicator, count=2, exchange=mix, warmup_steps=1)[1].waits

    waits = run_in_lockstep(2, rank)
    assert waits == [published] * 2


def test_norms_bring_the_rows_of_their_convolutions_and_the_first_convolution_needs_none() -> None:
    def rank(communicator: LockstepCommunicator) -> UNet2DConditionModel:
        unet = sdxl_layers()
        steps(unet, communicator, count=1)
        return unet

    unet, _ = run_in_lockstep(2, rank)
    convs = [m for m in unet.modules() if isinstance(m, PatchConv2d) and m.kernel_size[0] > 1]
    windows = [m.window for m in unet.modules() if isinstance(m, PatchGroupNorm)]
    assert unet.conv_in.halos_from == "whole"
    assert sum(conv.halos_from is None for conv in convs) == 4  # what samples up and down
    assert sum(window is not None for window in windows) == len(convs) - 5
