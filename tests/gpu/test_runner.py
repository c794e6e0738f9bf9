"""Runners of segments on one device, in lock-step: on a GPU, and on a CPU so that they are known to run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distriray import ParallelConfig
from distriray.gang.messages import RankResult, SegmentEnd
from tests.likeness import apart
from tests.unit.gang.runners import Gang, endings

from .turns import Turns

DISPLACED = ParallelConfig(exchange="displaced", warmup_steps=1, cfg_parallel=False)


@pytest.fixture
def gang(tiny_model: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> Gang:
    Turns().install(monkeypatch)
    return Gang(tiny_model, 2, device)


def picture(results: list[RankResult]) -> Any:
    """What the gang has drawn, or the first of several lone workers."""
    assert endings(results) == [SegmentEnd.DONE] * len(results), [result.cause for result in results]
    return next(result.images for result in results if result.images is not None)[0]


def test_a_gang_draws_what_a_lone_worker_draws_and_says_how_long_it_waited(gang: Gang) -> None:
    alone, together = gang.run(link="alone"), gang.run()
    assert apart(picture(together), picture(alone)) <= 1
    assert all(rank.waited is not None and 0.0 <= rank.waited < 1.0 for rank in together)
    assert all(len(rank.fresh_s) == 2 and min(rank.fresh_s) > 0.0 for rank in together)
    assert sum(rank.images is not None for rank in together) == 1


def test_pictures_of_steps_that_were_met_before_are_those_of_steps_that_were_not(gang: Gang) -> None:
    """On a GPU these are launched kernel by kernel, and then as graphs."""
    launched = picture(
        gang.run(parallel=DISPLACED.model_copy(update={"cuda_graphs": False}), num_inference_steps=5)
    )
    for _ in range(3):
        results = gang.run(parallel=DISPLACED, num_inference_steps=5)
        assert apart(picture(results), launched) == 0
        assert all((len(rank.fresh_s), len(rank.stale_s)) == (1, 4) for rank in results)


def test_previews_are_made_while_the_gang_goes_on(gang: Gang) -> None:
    first, second = gang.run(parallel=DISPLACED, num_inference_steps=6, previews=2)
    assert [step for step, _ in first.previews] == [2, 4] and not second.previews
    again, _ = gang.run(parallel=DISPLACED, num_inference_steps=6)
    assert apart(picture([first, second]), picture([again, second])) == 0


@pytest.mark.parametrize("exchange", ["sync", "displaced"])
def test_a_request_leaves_its_gang_goes_on_alone_and_comes_back(gang: Gang, exchange: str) -> None:
    """A displaced step on a GPU leaves one later, and whichever gang goes on begins with a fresh one."""
    parallel = DISPLACED.model_copy(update={"exchange": exchange})
    run = partial(gang.run, parallel=parallel, num_inference_steps=9)
    whole = run()
    with asked_to_yield(gang, in_step=3):
        first = run(job=1)
    assert endings(first) == [SegmentEnd.YIELDED] * 2 and {rank.step for rank in first} <= {3, 4}
    with asked_to_yield(gang, in_step=6):
        alone = run(job=1, step=first[0].step, link="alone")
    assert endings(alone) == [SegmentEnd.YIELDED] * 2 and {rank.step for rank in alone} <= {6, 7}
    blob = gang.runners[0].export(1)
    last = run(job=2, step=alone[0].step, blob=blob)
    assert picture(last)
    if exchange == "sync":
        assert apart(picture(last), picture(whole)) <= 1
    else:
        left = 9 - alone[0].step
        assert all((len(rank.fresh_s), len(rank.stale_s)) == (1, left - 1) for rank in last)


@contextmanager
def asked_to_yield(gang: Gang, in_step: int) -> Iterator[None]:
    """Every rank is, in the step with that number."""
    with pytest.MonkeyPatch.context() as patch:
        for runner in gang.runners:

            def step(state: Any, runner: Any = runner, own: Any = runner._denoiser.step) -> None:
                if state.step == in_step - 1:
                    runner._engine.ask_yield()
                own(state)

            patch.setattr(runner._denoiser, "step", step)
        yield
