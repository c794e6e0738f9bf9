"""Segments on the workers' side: whose fault it is when one goes wrong, in gangs of threads over gloo."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distriray.collective import Communicator
from distriray.collective.all_gather import numbers_of_all
from distriray.config import ParallelConfig
from distriray.denoise import DenoiseState
from distriray.errors import DistrirayError, InvalidRequest, NotFinite, OutOfMemory
from distriray.gang.devices import DEVICES
from distriray.gang.messages import GangMembership, RankResult, SegmentEnd
from distriray.gang.runner import SegmentRunner
from distriray.picture import png
from tests.models import tiny_flux2_klein_distilled, tiny_sdxl
from tests.unit.parallel.recorded import RecordedGraphs

from .fleet import ask
from .runners import Gang, endings

STICKY = RuntimeError("CUDA error: an illegal memory access was encountered")


def raises(error: Exception) -> Callable[..., Any]:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    return fails


@pytest.fixture(scope="module")
def shared(tiny_model: Path) -> Gang:
    return Gang(tiny_model, 2)


@pytest.fixture
def gang(shared: Gang, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gang]:
    """Two linked runners, which every test must leave able to draw."""
    yield shared
    monkeypatch.undo()
    assert endings(shared.run()) == [SegmentEnd.DONE] * 2


def test_memory_is_given_back_before_gangs_are_formed_and_when_it_has_run_out(
    gang: Gang, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed: list[str] = []
    monkeypatch.setattr(DEVICES["cpu"], "trim", lambda: trimmed.append("now"))
    gang.runners[0].link([])
    assert len(trimmed) == 1
    dropped: list[str] = []
    for runner in gang.runners:
        monkeypatch.setattr(runner._denoiser, "prepare", raises(MemoryError()))
        monkeypatch.setattr(runner._engine.graphs, "give_back", lambda: dropped.append("now"))
    gang.run()
    assert len(trimmed) == 3 and len(dropped) == 2


def test_ranks_say_what_share_of_a_step_they_waited_and_a_lone_worker_has_nobody_to_wait_for(
    gang: Gang,
) -> None:
    together = gang.run()
    assert all(rank.waited is not None and 0.0 < rank.waited < 1.0 for rank in together)
    assert all(rank.waited is None for rank in gang.run(link="alone"))


def test_a_worker_says_how_many_heads_it_could_deal_and_whether_steps_may_be_short(
    gang: Gang, tmp_path: Path
) -> None:
    """Heads as the layer of its network that has fewest."""
    facts = gang.runners[0].facts()
    assert facts.key_heads == 2 and not facts.has_short_steps
    tiny_flux2_klein_distilled().save_pretrained(tmp_path)
    facts = Gang(tmp_path, 1).runners[0].facts()
    assert facts.key_heads == 2 and facts.has_short_steps


def test_what_a_scheduler_does_not_take_is_refused_by_all_ranks(gang: Gang) -> None:
    outcomes = gang.run(scheduler="lcm", num_inference_steps=51)
    assert endings(outcomes) == [SegmentEnd.REFUSED] * 2
    assert all(isinstance(o.error, InvalidRequest) and "51" in str(o.error) for o in outcomes)


def test_what_of_a_prompt_is_not_used_is_said_with_the_picture_also_by_who_took_its_state_over(
    gang: Gang, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stepping(runner: SegmentRunner, step: Callable[..., None], state: DenoiseState) -> None:
        runner._engine.ask_yield()
        step(state)

    said = ("prompt has 100 tokens, and a text encoder takes 75: the rest is not used",)
    assert gang.run(prompt="x" * 100)[0].warnings == said
    assert gang.run()[0].warnings == ()
    for runner in gang.runners:
        step = runner._denoiser.step
        monkeypatch.setattr(runner._denoiser, "step", partial(stepping, runner, step))
    first = gang.run(job=1, prompt="x" * 100)
    assert endings(first) == [SegmentEnd.YIELDED] * 2
    monkeypatch.undo()
    blob = gang.runners[0].export(1)
    for runner in gang.runners:
        runner.retain([], 1)
    last = gang.run(job=1, step=first[0].step, prompt="x" * 100, blob=blob)
    assert endings(last) == [SegmentEnd.DONE] * 2 and last[0].warnings == said


def test_numbers_that_run_away_end_the_request_alike_on_all_ranks_and_show_no_preview(
    gang: Gang, monkeypatch: pytest.MonkeyPatch
) -> None:
    for runner in gang.runners:
        step = runner._denoiser.step

        def runs_away(state: DenoiseState, step: Callable[..., None] = step) -> None:
            step(state)
            state.latents[0, 0, 0, 0] = float("nan")

        monkeypatch.setattr(runner._denoiser, "step", runs_away)
    outcomes = gang.run(previews=1, num_inference_steps=4)
    assert endings(outcomes) == [SegmentEnd.REFUSED] * 2 and not outcomes[0].previews
    assert all(isinstance(outcome.error, NotFinite) for outcome in outcomes)


def test_one_rank_that_cannot_prepare_lets_the_others_go_at_once(
    gang: Gang, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gang.runners[1]._denoiser, "prepare", raises(InvalidRequest("not so")))
    outcomes = gang.run()
    assert endings(outcomes) == [SegmentEnd.NOT_BEGUN, SegmentEnd.REFUSED]
    assert isinstance(outcomes[1].error, InvalidRequest)


def test_one_rank_that_can_neither_prepare_nor_say_so_lets_the_others_go_at_once(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gang, began = Gang(tiny_model, 2), time.monotonic()
    monkeypatch.setattr(gang.runners[1]._denoiser, "prepare", raises(torch.OutOfMemoryError("CUDA")))

    def tell(communicator: Communicator, ready: int) -> list[int]:
        if not ready:
            raise torch.OutOfMemoryError("CUDA")
        return numbers_of_all(communicator, ready)

    monkeypatch.setattr("distriray.gang.rank_segment.numbers_of_all", tell)
    outcomes = gang.run()
    assert [outcome.end for outcome in outcomes] == [SegmentEnd.BROKEN, SegmentEnd.REFUSED]
    assert isinstance(outcomes[1].error, OutOfMemory) and time.monotonic() - began < 8.0


def test_one_rank_that_is_ready_and_cannot_say_so_lets_the_others_go_at_once(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gang = Gang(tiny_model, 2)
    mute = gang.runners[1]._communicators["all"]

    def tell(communicator: Communicator, ready: int) -> list[int]:
        if communicator is mute:
            raise torch.OutOfMemoryError("CUDA")
        return numbers_of_all(communicator, ready)

    monkeypatch.setattr("distriray.gang.rank_segment.numbers_of_all", tell)
    began, outcomes = time.monotonic(), gang.run()
    assert [outcome.end for outcome in outcomes] == [SegmentEnd.BROKEN, SegmentEnd.REFUSED]
    assert isinstance(outcomes[1].error, OutOfMemory) and time.monotonic() - began < 8.0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_memory_that_runs_out_while_preparing_is_the_requests_own(
    gang: Gang, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(gang.runners[0]._denoiser, "prepare", raises(error))
    outcomes = gang.run()
    assert endings(outcomes) == [SegmentEnd.REFUSED, SegmentEnd.NOT_BEGUN]
    assert isinstance(outcomes[0].error, OutOfMemory) and "128x128" in str(outcomes[0].error)


def test_what_was_computed_when_memory_ran_out_is_gone_when_memory_is_given_back(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gang = Gang(tiny_model, 1)
    computed: list[weakref.ref[torch.Tensor]] = []
    kept: list[bool] = []

    def decode(state: Any) -> Any:
        activations = torch.zeros(9)
        computed.append(weakref.ref(activations))
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError as error:
            raise RuntimeError("out of memory in a tile") from error

    monkeypatch.setattr(gang.runners[0]._denoiser, "decode", decode)
    monkeypatch.setattr(DEVICES["cpu"], "trim", lambda: kept.append(computed[-1]() is not None))
    assert endings(gang.run(link="alone")) == [SegmentEnd.REFUSED]
    assert kept == [False]


def test_memory_of_graphs_is_let_go_where_memory_runs_out(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but graphs can have it."""
    gang, kept = Gang(tiny_model, 1), ["memory"]
    (runner,) = gang.runners
    gang.run(link="alone")  # joins

    class Maker(RecordedGraphs):
        def let_go(self) -> None:
            kept.clear()

    runner._engine.capture_with(Maker())
    monkeypatch.setattr(runner._denoiser, "decode", raises(torch.OutOfMemoryError("CUDA out of memory")))
    assert endings(gang.run(link="alone")) == [SegmentEnd.REFUSED]
    assert not kept and runner._engine.graphs.alone is not None and len(runner._engine.graphs.alone) == 0


def test_another_error_while_preparing_is_the_requests_own_if_the_device_works(
    gang: Gang, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gang.runners[0]._denoiser, "prepare", raises(IndexError(3)))
    (refused, _) = outcomes = gang.run()
    assert endings(outcomes) == [SegmentEnd.REFUSED, SegmentEnd.NOT_BEGUN]
    assert type(refused.error) is DistrirayError and "IndexError" in str(refused.error)


def test_an_error_while_preparing_is_the_workers_own_if_the_device_does_not_work(
    gang: Gang, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gang.runners[1]._denoiser, "prepare", raises(STICKY))
    monkeypatch.setattr(gang.runners[1], "device", torch.device("cuda", 99))  # there is none
    outcomes = gang.run()
    assert endings(outcomes) == [SegmentEnd.NOT_BEGUN, SegmentEnd.FAILED]
    assert "illegal memory access" in outcomes[1].cause


@pytest.mark.parametrize("verb", ["step", "decode"])
def test_a_lone_worker_that_fails_says_so_and_its_communicator_goes_on(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    gang = Gang(tiny_model, 1)
    with monkeypatch.context() as patch:
        patch.setattr(gang.runners[0]._denoiser, verb, raises(STICKY))
        assert endings(gang.run(link="alone")) == [SegmentEnd.FAILED]
    assert endings(gang.run(link="alone")) == [SegmentEnd.DONE]


@pytest.mark.parametrize(
    ("error", "ending"), [(STICKY, SegmentEnd.FAILED), (torch.OutOfMemoryError("CUDA"), SegmentEnd.REFUSED)]
)
def test_a_rank_that_leaves_alone_breaks_its_gang_and_the_others_keep_their_step(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, ending: SegmentEnd
) -> None:
    gang = Gang(tiny_model, 2)
    monkeypatch.setattr(gang.runners[1]._denoiser, "step", raises(error))
    survivor, alone = gang.run()
    assert survivor.end is SegmentEnd.BROKEN and survivor.step == 0
    assert alone.end is ending
    assert survivor.broken and alone.broken


@pytest.mark.parametrize(
    ("error", "ending"), [(STICKY, SegmentEnd.FAILED), (torch.OutOfMemoryError("CUDA"), SegmentEnd.REFUSED)]
)
def test_a_rank_that_fails_while_it_decodes_alone_leaves_its_gang_whole(
    gang: Gang, monkeypatch: pytest.MonkeyPatch, error: Exception, ending: SegmentEnd
) -> None:
    """The others have come back, and wait for nothing of it."""
    monkeypatch.setattr(gang.runners[0]._denoiser, "decode", raises(error))
    alone = ParallelConfig(exchange="displaced", parallel_vae=False)
    assert endings(gang.run(parallel=alone, num_inference_steps=6)) == [ending, SegmentEnd.DONE]


def test_a_rank_that_fails_while_all_decode_lets_the_others_go(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gang = Gang(tiny_model, 2)
    monkeypatch.setattr(gang.runners[0]._denoiser, "decode", raises(torch.OutOfMemoryError("CUDA")))
    outcomes = gang.run()
    assert [outcome.end for outcome in outcomes] == [SegmentEnd.REFUSED, SegmentEnd.BROKEN]


def test_a_state_that_is_sent_goes_before_one_that_is_here_and_at_the_same_step(gang: Gang) -> None:
    """As a worker has it that could not send its own, after others have drawn those steps anew."""
    own, sent = gang.run(job=21, seed=7), gang.run(job=22, seed=8)
    blob = gang.runners[0].export(22)
    taken = gang.run(job=21, step=2, blob=blob)
    assert difference(sent, taken) == 0 and difference(own, taken) > 1


def test_a_state_is_never_taken_for_that_of_another_request_with_the_same_id(gang: Gang) -> None:
    gang.run(job=1, id="same")
    assert [runner._states[1].step for runner in gang.runners] == [2, 2]
    outcomes = gang.run(job=2, step=2, id="same")  # it has no state of this job
    assert endings(outcomes) == [SegmentEnd.REFUSED] * 2


def test_only_states_of_jobs_that_are_over_are_dropped(gang: Gang) -> None:
    for job in (11, 12, 13):
        gang.run(job=job)
    runner = gang.runners[0]
    runner.retain({11}, 12)
    assert {11, 13} <= runner._states.keys() and 12 not in runner._states


def test_a_broken_gang_is_released_before_another_takes_its_place(
    gang: Gang, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU both take as much memory."""
    runner, done = gang.runners[0], list[str]()
    broken = SimpleNamespace(broken=True, close=lambda: done.append("release"))
    monkeypatch.setattr(runner, "_communicators", {**runner._communicators, "all": broken})
    monkeypatch.setattr(runner, "_names", dict(runner._names))

    def connect(**_: Any) -> Any:
        done.append("connect")
        return SimpleNamespace(backend="none")

    monkeypatch.setattr("distriray.gang.runner.connect", connect)
    runner.link([GangMembership((0, 1), "again", 0, 2)])
    assert done[:2] == ["release", "connect"]


def test_the_thread_that_computes_lets_go_of_what_another_one_drops(gang: Gang) -> None:
    gang.run(job=11)
    runner, let_go = gang.runners[0], list[int]()
    weakref.finalize(runner._states[11], lambda: let_go.append(threading.get_ident()))
    runner.retain([], 11)
    gc.collect()
    assert not let_go and 11 not in runner._states
    gang.run(job=12)
    gc.collect()
    assert let_go and let_go[0] != threading.get_ident()


PICTURE = Image.linear_gradient("L").resize((128, 128)).convert("RGB")
MASK = Image.new("L", (128, 128))
MASK.paste(255, (32, 48, 128, 128))


def difference(one: list[RankResult], other: list[RankResult]) -> int:
    """The largest between two pictures' values."""
    (first,), (second,) = ([r.images for r in results if r.images is not None] for results in (one, other))
    return int(np.abs(np.array(first[0], dtype=int) - np.array(second[0], dtype=int)).max())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("mask", [None, MASK])
def test_a_picture_is_drawn_on_and_filled_in_by_a_gang_as_by_one_device(
    tmp_path: Path, size: int, channels: int, mask: Image.Image | None
) -> None:
    """The order has no picture; those who prepare the request are given it besides."""
    if channels == 9 and mask is None:
        pytest.skip("such a network fills in masks only")
    tiny_sdxl(in_channels=channels).save_pretrained(tmp_path)
    gang = Gang(tmp_path, size)
    pictures = {"image": PICTURE, "mask_image": mask, "strength": 0.7, "num_inference_steps": 4}
    alone, together = gang.run(link="alone", **pictures), gang.run(**pictures)
    assert endings(together) == [SegmentEnd.DONE] * size
    assert together[0].step == 2
    assert difference(alone, together) <= 1
    assert difference(alone, gang.run(link="alone", **{**pictures, "image": MASK})) > 1


def test_a_gang_that_goes_on_needs_no_pictures_any_more(gang: Gang) -> None:
    """The state has them as latents, also where it came as bytes."""
    pictures = {"image": PICTURE, "mask_image": MASK, "strength": 1.0, "num_inference_steps": 4}
    whole = gang.run(job=31, **pictures)
    blob = gang.runners[0]._denoiser.prepare(ask(**pictures)).to_bytes()
    gone_on = gang.run(job=32, blob=blob, num_inference_steps=4)
    assert endings(gone_on) == [SegmentEnd.DONE] * 2
    assert difference(whole, gone_on) <= 1


def test_a_damaged_picture_is_the_requests_fault(gang: Gang) -> None:
    whole = png(PICTURE.effect_spread(30))
    outcomes = gang.run(image=whole[: len(whole) // 2])
    assert endings(outcomes) == [SegmentEnd.REFUSED] * 2
    assert isinstance(outcomes[0].error, InvalidRequest) and outcomes[0].error.param == "image"
    assert "damaged or cut short" in str(outcomes[0].error)
    assert endings(gang.run()) == [SegmentEnd.DONE] * 2
