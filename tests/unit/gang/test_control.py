"""ControlNets of requests on their way through a host and its workers."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from pydantic import ValidationError
from torch.distributed import HashStore

from distriray.controls import MOST_CONTROLNETS, ControlNetSpec
from distriray.errors import ControlNetNotFound, InvalidRequest, UnusableControlNet
from distriray.gang.config import HostConfig
from distriray.gang.messages import SegmentEnd, StopSignal
from distriray.gang.runner import SegmentRunner
from distriray.models import ModelSpec
from distriray.picture import png
from tests.models import tiny_controlnet, tiny_sd15, tiny_sdxl

from .fleet import FakeHost
from .runners import Gang, endings
from .test_dispatcher import Script, at, do, opened

CANNY = ControlNetSpec(name="canny", source="some/canny")
EDGES = Image.effect_noise((128, 128), 90)
ASKED: dict[str, Any] = {"control": [{"name": "canny", "image": EDGES, "scale": 0.5}]}
LONG = 400


def test_pictures_of_control_are_put_once_and_are_in_no_order() -> None:
    async def scene() -> None:
        policy = Script([(0, 1), (0, 1, 2, 3)], every=LONG)
        async with FakeHost(4, policy, controls=[CANNY], **opened()) as host:
            job = host.accept(num_inference_steps=60, **ASKED)
            given = job.pictures
            assert [*given] == ["control.0.image"]
            assert len(pickle.dumps((job.request, job.view()))) < len(png(EDGES)) / 2
            await at(job, 10)
            policy.at = 1
            job.yield_() and host.dispatcher._stop(job, StopSignal.YIELD)
            result = await job.ended
            assert [len(segment.workers) for segment in result.segments] == [2, 4]
            told = [pictures for worker in host.fleet.launched for _, pictures in worker.pictures]
            assert host.fleet.shared == 1 and told.count(given) == 2 and told.count(None) == 4
            assert not job.pictures, "nobody has them any more"

    do(scene())


def test_when_all_who_hold_a_state_die_its_request_begins_again_with_them() -> None:
    async def scene() -> None:
        async with FakeHost(1, controls=[CANNY], **opened()) as host:
            first, job = host.fleet.at(0), host.accept(num_inference_steps=200, **ASKED)
            given = job.pictures
            await at(job, 10)
            first.die()
            result = await job.ended
            assert result.repairs == 1 and result.segments[-1].first_step == 0
            assert [pictures for _, pictures in host.fleet.at(0).pictures] == [given]

    do(scene())


def test_what_control_takes_is_learnt_of_it_alone() -> None:
    async def scene() -> None:
        async with FakeHost(1, controls=[CANNY], **opened()) as host:
            model, plain = host.dispatcher.speed.model, host.accept(num_inference_steps=8)
            await plain.ended
            known, learnt = model.times(1, *plain.view().shape), model.observations
            assert learnt == 1
            controlled = host.accept(num_inference_steps=8, **ASKED)
            assert controlled.view().besides == (("control canny 0 1", 0.3),)
            await controlled.ended
            assert model.observations == learnt + 1 and model.times(1, *plain.view().shape) == known

    do(scene())


def test_nothing_is_learnt_of_a_part_of_the_steps_where_control_is_in_a_part_of_them() -> None:
    async def scene() -> None:
        policy = Script([(0, 1), (0, 1, 2, 3)], every=LONG)
        async with FakeHost(4, policy, controls=[CANNY], **opened()) as host:
            model, half = host.dispatcher.speed.model, [{**ASKED["control"][0], "end": 0.5}]
            job = host.accept(num_inference_steps=60, control=half)
            assert job.view().besides == (("control canny 0 0.5", pytest.approx(0.15)),)
            await at(job, 10)
            policy.at = 1
            job.yield_() and host.dispatcher._stop(job, StopSignal.YIELD)
            assert len((await job.ended).segments) == 2 and model.observations == 0
            await host.accept(num_inference_steps=8, control=half).ended
            assert model.observations == 1

    do(scene())


def test_an_unknown_name_is_refused_at_once_with_those_that_there_are() -> None:
    async def scene() -> None:
        async with FakeHost(1, controls=[CANNY]) as host:
            with pytest.raises(ControlNetNotFound, match="no ControlNet 'pose'; there is 'canny'"):
                host.accept(control=[{"name": "pose", "image": EDGES}])
            with pytest.raises(InvalidRequest, match="control names 'canny' more than once"):
                host.accept(control=ASKED["control"] * 2)
        async with FakeHost(1, controls=[CANNY], limits={"max_controls": 0}) as host:
            with pytest.raises(InvalidRequest, match="control names 1 ControlNet; the limit is 0"):
                host.accept(**ASKED)

    do(scene())


def test_a_pool_lists_each_name_once_and_not_too_many() -> None:
    with pytest.raises(ValidationError, match="'canny'. are there more than once"):
        HostConfig(controls=(CANNY, CANNY))
    many = tuple(ControlNetSpec(name=f"c{i}", source="some/one") for i in range(MOST_CONTROLNETS + 1))
    with pytest.raises(ValidationError, match="at most 16"):
        HostConfig(controls=many)


@pytest.fixture(scope="module")
def canny(tmp_path_factory: pytest.TempPathFactory) -> ControlNetSpec:
    folder = tmp_path_factory.mktemp("canny")
    tiny_controlnet(tiny_sdxl().unet, 1).save_pretrained(folder)
    return ControlNetSpec(name="canny", source=str(folder))


def test_a_worker_loads_what_is_listed_and_a_gang_draws_with_it(
    tiny_model: Path, canny: ControlNetSpec
) -> None:
    gang = Gang(tiny_model, 2)
    for runner in gang.runners:
        runner._denoiser.controls.load(canny)

    def picture(**fields: Any) -> Image.Image:
        outcomes = gang.run(num_inference_steps=3, **fields)
        assert endings(outcomes) == [SegmentEnd.DONE] * 2
        (image,) = outcomes[0].images or ()
        return image

    plain, controlled = picture(), picture(**ASKED)
    assert ImageChops.difference(plain, controlled).getbbox()
    assert picture() == plain and picture(**ASKED) == controlled
    zero = [{**ASKED["control"][0], "scale": 0.0}]
    assert picture(control=zero) == plain


def test_a_worker_does_not_start_with_one_that_does_not_fit(tiny_model: Path, tmp_path: Path) -> None:
    tiny_controlnet(tiny_sd15().unet).save_pretrained(tmp_path)
    spec = ControlNetSpec(name="canny", source=str(tmp_path))
    with pytest.raises(UnusableControlNet, match="'canny' cannot be used: .* of the model"):
        SegmentRunner(
            ModelSpec(name=str(tiny_model)),
            torch.device("cpu"),
            HashStore(),
            timeout_s=10.0,
            controls=(spec,),
        )
