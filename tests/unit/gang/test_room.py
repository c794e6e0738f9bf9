"""Workers say before they serve whether gangs have room for their buffers, and refuse what has none."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.distributed import HashStore

from distriray import parallelize
from distriray.collective import connect
from distriray.config import ParallelConfig
from distriray.denoise import Denoiser
from distriray.errors import GangMismatch, OutOfMemory, UnsupportedModel
from distriray.gang.config import HostConfig
from distriray.gang.messages import SegmentEnd, WorkerId
from distriray.gang.room import _enlarged, check_room
from distriray.gang.runner import SegmentRunner
from distriray.gang.segment_result import SegmentResult
from distriray.limits import Limits
from distriray.models import ModelSpec
from distriray.parallel import engine_of
from distriray.parallel.room import Room
from distriray.picture import Picture
from distriray.references import Reference
from distriray.requests import SamplingParams
from tests.edits import shrink
from tests.models import (
    tiny_flux2_klein_distilled,
    tiny_qwen_image,
    tiny_qwen_image21,
    tiny_qwen_image_edit_plus,
    tiny_sdxl,
)

from .runners import Gang, endings

LIMITS = Limits(max_images=2, max_side=512)
PATCHES = ParallelConfig(exchange="displaced", cfg_parallel=False)


def started(
    free: int | None,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int = 4,
    parallel: ParallelConfig = PATCHES,
) -> tuple[SegmentRunner, HostConfig]:
    """A worker whose device has so many bytes free."""
    monkeypatch.setattr("distriray.gang.runner.free_bytes", lambda device: free)
    runner = SegmentRunner(ModelSpec(name=str(model)), torch.device("cpu"), HashStore(), timeout_s=10.0)
    config = HostConfig(workers=workers, limits=LIMITS, parallel=parallel)
    check_room(runner, config, runner.facts())
    return runner, config


def test_a_model_whose_own_size_has_no_room_is_refused_with_the_bytes_of_each_part(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = (
        r"an image of 128x128 in a gang of \d would take \d\.\d GB of exchange buffers on each worker of a "
        r"gang, in exchange 'displaced', where cpu has 0.0 GB free beside weights of \d\.\d GB "
        r"\(.*unet 0.0.*\); `exchange: sync` and `gang_sizes: \[1\]` need less"
    )
    with pytest.raises(UnsupportedModel, match=said):
        started(1000, tiny_model, monkeypatch)
    begins = r"in exchange 'auto', which begins with 'sync', where .*; `gang_sizes: \[1\]` needs less"
    with pytest.raises(UnsupportedModel, match=begins):
        started(1000, tiny_model, monkeypatch, parallel=ParallelConfig(cfg_parallel=False))
    started(1000, tiny_model, monkeypatch, workers=1)  # it exchanges nothing
    started(None, tiny_model, monkeypatch)  # nobody knows


def test_the_largest_request_that_limits_allow_is_said_to_fit_or_not(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ray.serve.distriray.worker")
    runner, config = started(10**10, tiny_model, monkeypatch)
    (fits,) = (record for record in caplog.records if "largest request" in record.message)
    assert fits.levelno == logging.INFO
    assert "2 of 512x512 in a gang of 4, would take" in fits.message
    caplog.clear()
    largest = SamplingParams(prompt="a lake", seed=1, height=512, width=512, num_images=2)
    needed = runner.buffer_bytes_of(runner.calls(largest), 4, config.parallel)
    started(needed, tiny_model, monkeypatch)
    started(needed - 1, tiny_model, monkeypatch)
    levels = [record.levelno for record in caplog.records if "largest request" in record.message]
    assert levels == [logging.INFO, logging.WARNING]
    assert re.search("ends with OutOfMemory before its first step; lower limits", caplog.messages[-1])


@pytest.mark.parametrize("make", [tiny_qwen_image, tiny_sdxl])
def test_the_largest_request_may_be_one_without_guidance_whose_images_have_no_halves(
    make: Callable[[], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A gang of two exchanges nothing where each has a branch or an image of its own."""
    make().save_pretrained(tmp_path)
    caplog.set_level(logging.INFO, "ray.serve.distriray.worker")
    monkeypatch.setattr(f"{__name__}.LIMITS", LIMITS.model_copy(update={"max_prompt_chars": len("a lake")}))
    halves = ParallelConfig(exchange="displaced")
    runner, config = started(10**10, tmp_path, monkeypatch, workers=2, parallel=halves)
    (message,) = (each for each in caplog.messages if "largest request" in each)
    assert "1 of 512x512 in a gang of 2, would take" in message
    asked = {"prompt": "a lake", "seed": 1, "height": 512, "width": 512}
    guided, without, two = (
        runner.buffer_bytes_of(runner.calls(SamplingParams(**asked, **fields)), 2, config.parallel)
        for fields in ({}, {"guidance_scale": 1.0}, {"guidance_scale": 1.0, "num_images": 2})
    )
    assert guided == two == 0 < without
    caplog.clear()
    for free in (
        without * 11 // 10,
        without * 9 // 10,
    ):  # the longest prompt is asked
        started(free, tmp_path, monkeypatch, workers=2, parallel=halves)
    levels = [record.levelno for record in caplog.records if "largest request" in record.message]
    assert levels == [logging.INFO, logging.WARNING]


def test_what_a_model_edits_counts_in_the_largest_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_flux2_klein_distilled().save_pretrained(tmp_path)
    caplog.set_level(logging.INFO, "ray.serve.distriray.worker")
    shown = (Reference(image=Picture.of(Image.new("RGB", (1024, 1024)))),) * LIMITS.max_references
    largest = {"prompt": "a lake", "seed": 1, "height": 512, "width": 512, "num_images": 2}
    runner, config = started(10**10, tmp_path, monkeypatch, workers=2)
    plain, edited = (
        runner.buffer_bytes_of(runner.calls(SamplingParams(**largest, **pictures)), 2, config.parallel)
        for pictures in ({}, {"references": shown})
    )
    assert edited > 2 * plain
    caplog.clear()
    for free in (edited * 11 // 10, edited * 9 // 10):  # the longest prompt is asked
        started(free, tmp_path, monkeypatch, workers=2)
    levels = [record.levelno for record in caplog.records if "largest request" in record.message]
    assert levels == [logging.INFO, logging.WARNING]


def test_a_picture_of_which_a_mask_is_filled_in_counts_there_as_large_as_it_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_flux2_klein_distilled().save_pretrained(tmp_path)
    caplog.set_level(logging.INFO, "ray.serve.distriray.worker")
    limits = Limits(max_images=1, max_side=1536, max_references=1)
    monkeypatch.setattr(f"{__name__}.LIMITS", limits)
    picture, mask = Image.new("RGB", (1536, 1536)), Picture.of(Image.new("L", (1536, 1536)))
    largest = SamplingParams(prompt="a lake", seed=1, height=1536, width=1536, image=picture, mask_image=mask)
    runner, config = started(10**10, tmp_path, monkeypatch, workers=2)
    needed = runner.buffer_bytes_of(runner.calls(largest), 4, config.parallel)
    caplog.clear()
    for free in (needed * 11 // 10, needed * 9 // 10):
        started(free, tmp_path, monkeypatch, workers=2)
    levels = [record.levelno for record in caplog.records if "largest request" in record.message]
    assert levels == [logging.INFO, logging.WARNING]


def test_a_model_starts_though_limits_allow_prompts_beyond_its_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shrink(monkeypatch)
    tiny_qwen_image_edit_plus().save_pretrained(tmp_path)
    caplog.set_level(logging.INFO, "ray.serve.distriray.worker")
    started(10**10, tmp_path, monkeypatch, workers=2)
    assert any("largest request" in message for message in caplog.messages)


def test_a_call_that_is_enlarged_takes_what_one_of_that_size_takes() -> None:
    """Also where the call says the image's size in words."""
    config = ParallelConfig(exchange="displaced", cfg_parallel=False)
    pipeline = parallelize(tiny_qwen_image21(), connect("local"), config)
    denoiser, engine = Denoiser(pipeline), engine_of(pipeline)
    assert engine is not None
    asked = {"prompt": "a lake", "seed": 1}
    small = denoiser.calls(SamplingParams(height=64, width=64, **asked))
    large = denoiser.calls(SamplingParams(height=128, width=128, num_images=2, **asked))
    enlarged = [_enlarged(call, 2, (64, 64), 0, 128, 0) for call in small]
    without, needed, own = (engine.buffer_bytes_of(calls, 3, config) for calls in (small, enlarged, large))
    assert without < needed == own


def test_a_call_that_edits_is_enlarged_by_what_it_is_shown_already() -> None:
    config = ParallelConfig(exchange="displaced", cfg_parallel=False)
    pipeline = parallelize(tiny_qwen_image_edit_plus(), connect("local"), config)
    denoiser, engine, picture = Denoiser(pipeline), engine_of(pipeline), Image.new("RGB", (1024, 1024))
    assert engine is not None
    asked = {"prompt": "a lake", "seed": 1, "image": picture}
    small = denoiser.calls(SamplingParams(height=64, width=64, **asked))
    others = (Reference(image=Picture.of(picture)),)
    large = denoiser.calls(SamplingParams(height=512, width=512, references=others, **asked))
    enlarged = [_enlarged(call, 1, (64, 64), 2**20, 512, 2 * 2**20) for call in small]
    needed, own = (engine.buffer_bytes_of(calls, 3, config) for calls in (enlarged, large))
    assert needed == pytest.approx(own, rel=0.03)  # with a picture more, the text has more tokens


def test_a_request_without_room_is_refused_by_the_gang_which_goes_on(tiny_model: Path) -> None:
    gang = Gang(tiny_model, 3)
    for runner in gang.runners:
        runner._engine.exchanges.room = Room(1000, "cuda:0 has 0.0 GB free beside weights of 1.0 GB")
    outcomes = gang.run(seed=3)
    assert endings(outcomes) == [SegmentEnd.REFUSED] * 3
    assert all(isinstance(outcome.error, OutOfMemory) for outcome in outcomes)
    for runner in gang.runners:
        runner._engine.exchanges.room = Room(10**10, "")
    assert endings(gang.run(seed=3)) == [SegmentEnd.DONE] * 3


def test_the_rank_that_has_no_room_says_so_for_the_gang(tiny_model: Path) -> None:
    gang = Gang(tiny_model, 2)
    gang.runners[1]._engine.exchanges.room = Room(0, "cuda:1 has 0.0 GB free")
    outcomes = gang.run(seed=3, guidance_scale=1.0)
    assert endings(outcomes) == [SegmentEnd.REFUSED] * 2
    assert [type(outcome.error) for outcome in outcomes] == [GangMismatch, OutOfMemory]
    result = SegmentResult({WorkerId(rank, 0): outcome for rank, outcome in enumerate(outcomes)})
    assert "cuda:1 has 0.0 GB free" in str(result.error)
