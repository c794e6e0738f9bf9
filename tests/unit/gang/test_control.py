"""ControlNets of requests on their way through a host and its workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from torch.distributed import HashStore

from distriray.controls import ControlNetSpec
from distriray.errors import UnusableControlNet
from distriray.gang.messages import SegmentEnd, StopSignal
from distriray.gang.runner import SegmentRunner
from distriray.models import ModelSpec
from tests.models import tiny_controlnet, tiny_sd15, tiny_sdxl

from .fleet import FakeHost
from .runners import Gang, endings
from .test_dispatcher import Script, at, do, opened

CANNY = ControlNetSpec(name="canny", source="some/canny")
EDGES = Image.effect_noise((128, 128), 90)
ASKED: dict[str, Any] = {"control": [{"name": "canny", "image": EDGES, "scale": 0.5}]}
LONG = 400


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
