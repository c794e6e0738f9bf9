"""Adapters of requests on their way through a host and its workers."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch.distributed import HashStore

from distriray.adapters import AdapterSpec, Lora
from distriray.errors import AdapterNotFound, UnusableAdapter
from distriray.gang.config import HostConfig
from distriray.gang.messages import SegmentEnd
from distriray.gang.runner import SegmentRunner
from distriray.gang.status import status_of
from distriray.models import ModelSpec
from distriray.status import AdapterStatus
from tests.adapters import write
from tests.models import tiny_sdxl

from .fleet import FakeHost, FakeWorker
from .runners import Gang, endings

INK, NEON, BAD = ({"name": name, "scale": 0.8} for name in ("ink", "neon", "bad"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[AdapterSpec, ...]:
    """Two that fit the tiny model, and one that does not."""
    folder, pipeline = tmp_path_factory.mktemp("adapters"), tiny_sdxl()
    write(folder / "ink.safetensors", pipeline, 1, text=True)
    write(folder / "neon.safetensors", pipeline, 2)
    write(folder / "bad.safetensors", pipeline, 3, lambda weights: weights.popitem())
    names = ("ink", "neon", "bad")
    return tuple(AdapterSpec(name=name, source=str(folder / f"{name}.safetensors")) for name in names)


@pytest.fixture(scope="module")
def gang(tiny_model: Path, adapters: tuple[AdapterSpec, ...]) -> Gang:
    gang = Gang(tiny_model, 2)
    for runner in gang.runners:  # here, as PEFT makes adapters in one thread of a process at a time
        runner._denoiser.adapters.learn(adapters[:2])
        runner._denoiser.adapters.choose([Lora(name="ink"), Lora(name="neon")])
    return gang


def picture(gang: Gang, **fields: Any) -> Image.Image:
    outcomes = gang.run(**fields)
    assert endings(outcomes) == [SegmentEnd.DONE] * 2
    (image,) = outcomes[0].images or ()
    return image


def test_requests_with_other_adapters_take_turns_and_say_what_switching_took(
    gang: Gang, adapters: tuple[AdapterSpec, ...]
) -> None:
    sets: list[list[Any]] = [[], [INK], [NEON], [INK, NEON]]
    first = [picture(gang, loras=loras, adapters=adapters).tobytes() for loras in sets]
    again = [picture(gang, loras=loras, adapters=adapters).tobytes() for loras in sets]
    assert first == again and len(set(first)) == 4
    hits = gang.runners[0]._denoiser.adapters.counts.hits
    (outcome, _) = gang.run(loras=[NEON], adapters=adapters)
    assert outcome.adapters_s > 0 and outcome.prepare_s > 0
    assert outcome.adapters.names == ("ink", "neon") and outcome.adapters.hits == hits + 1
    assert outcome.adapters.loads == 2 and outcome.adapters.memory > 0


def test_a_request_is_drawn_on_with_its_adapters_after_others_had_the_workers(
    gang: Gang, adapters: tuple[AdapterSpec, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = picture(gang, loras=[INK], adapters=adapters, num_inference_steps=3)
    with monkeypatch.context() as patch:
        for runner in gang.runners:
            step = runner._denoiser.step

            def stepping(state: Any, runner: SegmentRunner = runner, step: Any = step) -> None:
                runner._engine.ask_yield()
                step(state)

            patch.setattr(runner._denoiser, "step", stepping)
        left = gang.run(job=1, loras=[INK], adapters=adapters, num_inference_steps=3)
    assert endings(left) == [SegmentEnd.YIELDED] * 2
    picture(gang, loras=[NEON], adapters=adapters)
    step = left[0].step
    on = picture(gang, job=1, step=step, loras=[INK], adapters=adapters, num_inference_steps=3)
    assert on.tobytes() == whole.tobytes()


def test_an_adapter_that_one_rank_cannot_load_lets_all_leave_and_the_gang_go_on(
    gang: Gang, adapters: tuple[AdapterSpec, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = picture(gang)
    outcomes = gang.run(loras=[INK, BAD], adapters=adapters)
    assert endings(outcomes) == [SegmentEnd.REFUSED] * 2
    assert all(isinstance(outcome.error, UnusableAdapter) for outcome in outcomes)
    with monkeypatch.context() as patch:

        def fails(*_: Any) -> None:
            raise UnusableAdapter("gone")

        patch.setattr(gang.runners[1]._denoiser.adapters, "use", fails)
        assert endings(gang.run(loras=[INK], adapters=adapters)) == [
            SegmentEnd.NOT_BEGUN,
            SegmentEnd.REFUSED,
        ]
    assert picture(gang).tobytes() == plain.tobytes()


def test_listed_adapters_are_read_when_a_worker_starts(
    tiny_model: Path, adapters: tuple[AdapterSpec, ...]
) -> None:
    def start(*loras: AdapterSpec) -> SegmentRunner:
        model, device = ModelSpec(name=str(tiny_model)), torch.device("cpu")
        return SegmentRunner(model, device, HashStore(), timeout_s=10.0, loras=loras)

    with pytest.raises(UnusableAdapter, match="^adapter 'bad' does not fit the model: .* has no lora_"):
        start(*adapters)
    assert start(*adapters[:2])._denoiser.adapters.held == ()


def do(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 20))


def test_a_host_tells_its_workers_where_adapters_are_and_routers_what_they_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[AdapterSpec, ...]] = []
    run = FakeWorker._run

    async def noting(self: FakeWorker, order: Any, state: Any) -> Any:
        sent.append(order.adapters)
        result = await run(self, order, state)
        held = tuple(spec.name for spec in order.adapters)
        status = AdapterStatus(names=held, memory=8, loads=len(held))
        return replace(result, adapters=status)

    monkeypatch.setattr(FakeWorker, "_run", noting)

    async def scene() -> None:
        async with FakeHost(2, model={"name": "some/model"}, lora_dir=tmp_path) as host:
            with pytest.raises(AdapterNotFound, match="no adapter 'ink'; there is none here"):
                host.accept(loras=[INK])
            (tmp_path / "ink.safetensors").touch()
            await host.accept(loras=[INK], gang_size=2).ended
            assert [[spec.source for spec in specs] for specs in sent] == [
                [str(tmp_path / "ink.safetensors")]
            ] * 2
            assert host.dispatcher.adapters == {"ink"}
            workers = status_of(host.dispatcher, "cpu").workers
            assert [worker.adapters.names for worker in workers] == [("ink",)] * 2
            await host.accept(gang_size=2).ended
            assert sent[-1] == ()

    do(scene())


def test_an_adapter_that_is_taken_away_is_still_that_of_who_was_accepted_with_it(tmp_path: Path) -> None:
    async def scene() -> None:
        async with FakeHost(1, model={"name": "some/model"}, lora_dir=tmp_path) as host:
            (tmp_path / "ink.safetensors").touch()
            job = host.accept(loras=[INK])
            (tmp_path / "ink.safetensors").unlink()
            host.dispatcher.catalogue.look()
            with pytest.raises(AdapterNotFound):
                host.accept(loras=[INK])
            assert [spec.name for spec in job.adapters] == ["ink"]
            await job.ended

    do(scene())


def test_a_configuration_names_an_adapter_once() -> None:
    with pytest.raises(ValidationError, match=r"loras \['ink'\] are there more than once"):
        HostConfig.model_validate({"loras": [{"name": "ink", "source": "a/b"}] * 2})
    with pytest.raises(ValidationError, match="pattern"):
        HostConfig.model_validate({"loras": [{"name": "../ink", "source": "a/b"}]})
