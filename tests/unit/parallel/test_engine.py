"""One image by several ranks: the claims of the patch-parallel engine."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, run_in_lockstep
from distriray.config import MIXES, PAPER
from distriray.parallel import engine_of
from tests.cases import Case, Outcome, alone, call, together
from tests.models import tiny_sdxl
from tests.parameters import sweep

STALE = MIXES["displaced"]
SYNC = {"exchange": "sync", "cfg_parallel": False}
SPLIT = {"exchange": "sync", "cfg_parallel": True}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, of the largest magnitude."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def run(ranks: int, *cases: Case) -> list[Outcome]:
    """Rank 0's outcomes, after checking that all ranks hold the same latents."""
    everyone = run_in_lockstep(ranks, lambda communicator: together(communicator, list(cases)))
    for other in everyone[1:]:
        for ours, theirs in zip(everyone[0], other, strict=True):
            assert torch.equal(ours.latents, theirs.latents)
    return everyone[0]


def sync_cases(ranks: int) -> list[Case]:
    """Sizes whose rows do not divide evenly; every value of every option with every number of ranks.

    The schedulers move on by one case from each number of ranks to the next, so that all meet all sizes.
    """
    tall = {2: (200, 120), 3: (136, 136), 4: (264, 72), 8: (392, 64)}[ranks]
    wide = 32 * ranks + 8, 48 * ranks
    deep = {2: (216, 96), 3: (264, 72), 4: (328, 64), 8: (584, 64)}[ranks]  # four levels need more rows
    at = [2, 3, 4, 8].index(ranks)
    names = ["ddim", "euler", "dpmpp-2m", "euler-ancestral"]
    first, second, third, fourth = names[at:] + names[:at]
    model, size, images = ("sdxl", tall, 3) if at % 2 else ("sd15", deep, 1)
    config = SYNC if ranks % 2 else SPLIT
    return [
        Case("sdxl", *tall, steps=3, scheduler=first, config=SYNC),
        Case("sdxl", *wide, steps=3, scheduler=second, guidance=1.0, config=SYNC),
        Case("sd15", *deep, steps=3, scheduler=third, images=3, config=SYNC),
        Case(model, *size, steps=3, scheduler=fourth, images=images, config=config),
    ]


@pytest.mark.parametrize("ranks", sweep([2, 3, 4, 8]))
def test_sync_mode_equals_one_device(ranks: int) -> None:
    cases = sync_cases(ranks)
    for case, outcome in zip(cases, run(ranks, *cases), strict=True):
        assert difference(outcome.latents, alone(case)) <= 1e-4, case


def test_guidance_halves_equal_one_device_although_displaced() -> None:
    case = Case(config={"exchange": "displaced", "warmup_steps": 0, "cfg_parallel": True})
    (outcome,) = run(2, case)
    assert difference(outcome.latents, alone(case)) <= 1e-4
    assert outcome.buffer_bytes == 0  # no patches, nothing exchanged but the noise


def test_displaced_mode() -> None:
    patches = {"exchange": "displaced", "cfg_parallel": False}
    plain = Case(steps=6, config={**patches, "warmup_steps": 2})
    warm, again, none, sync = (
        Case(steps=6, config={**patches, "warmup_steps": 6}),
        Case(steps=6, config={**patches, "warmup_steps": 2}),
        Case(steps=6, config={**patches, "exchange": "none"}),
        Case(steps=6, config=SYNC),
    )
    first, warmed, second, naive, fresh = (o.latents for o in run(3, plain, warm, again, none, sync))
    assert torch.equal(warmed, fresh), "with warm-up throughout, displaced is synchronous"
    assert torch.equal(first, second), "same seed, same gang, same image"
    reference = alone(plain)
    assert 1e-4 < difference(first, reference) < difference(naive, reference) / 2


def test_every_mix_and_prediction_makes_a_picture_of_its_own() -> None:
    patches = {"exchange": "displaced", "cfg_parallel": False, "warmup_steps": 2}
    variants = [
        {"prediction": {"statistics": 0.0, "halos": 0.0}},
        {"prediction": {"statistics": 0.5, "halos": 0.0}},
        {"prediction": {"statistics": 0.0, "halos": 0.5}},
        {"prediction": {"statistics": 0.0, "halos": 0.0, "keys_values": 0.5}},
        {"prediction": {"statistics": "fitted", "halos": 0.0}},
        {"prediction": {"statistics": 0.0, "halos": "fitted"}},
        {"exchange": PAPER, "prediction": {"statistics": 0.0}},
        *({"exchange": STALE.model_copy(update={"statistics": how})} for how in ("fresh", "local")),
        {"exchange": "displaced_attention"},
        {"exchange": "compressed"},
    ]
    cases = [Case(config={**patches, **variant}) for variant in variants]
    pictures = [outcome.latents for outcome in run(2, *cases)]
    assert all(picture.isfinite().all() for picture in pictures)
    for one, other in itertools.combinations(range(len(pictures)), 2):
        assert not torch.equal(pictures[one], pictures[other]), (variants[one], variants[other])


def test_automatic_warm_up_ends_and_is_kept_alike() -> None:
    patches = {"exchange": "displaced", "cfg_parallel": False, "warmup_steps": "auto"}
    never = Case(config={**patches, "auto_warmup_drift": 1e-9})
    early = Case(config={**patches, "auto_warmup_drift": 10.0})
    stays, leaves = run(2, never, early)
    assert stays.statistics.synchronous and not leaves.statistics.synchronous
    assert difference(stays.latents, alone(never)) <= 1e-4


@pytest.mark.parametrize("exchange", ["compressed", {"halos": "stale"}])
def test_automatic_warm_up_ends_where_nothing_that_is_old_has_a_drift(exchange: Any) -> None:
    patches = {"exchange": exchange, "cfg_parallel": False}
    automatic, own = run(
        2, *(Case(steps=6, config={**patches, "warmup_steps": each}) for each in ("auto", None))
    )
    assert not automatic.statistics.synchronous
    assert torch.equal(automatic.latents, own.latents)


def test_a_second_order_scheduler_is_one_image() -> None:
    """Heun calls the network twice at a timestep: that is no new image."""
    case = Case(scheduler="heun", config={"exchange": "displaced", "warmup_steps": 1, "cfg_parallel": False})
    (outcome,) = run(2, case)
    assert not outcome.statistics.synchronous


def test_calls_of_changing_shape_keep_memory_bounded() -> None:
    patches = {"exchange": "displaced", "cfg_parallel": False, "max_buffer_bytes": 0, "warmup_steps": 1}
    small, large = Case(height=96, config=patches), Case(height=192, width=128, config=patches)

    def rank(communicator: Communicator) -> list[int]:
        pipeline = parallelize(tiny_sdxl(), communicator, ParallelConfig(**patches))
        engine = engine_of(pipeline)
        assert engine is not None
        sizes = []
        for case in (small, large, small):
            call(pipeline, case)
            sizes.append(engine.buffer_bytes)
        return sizes

    before, grown, after = run_in_lockstep(2, rank)[0]
    assert after == before < grown
