"""IP-Adapters of requests on their way through a host and its workers."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from pydantic import ValidationError
from torch.distributed import HashStore

from distriray.errors import InvalidRequest, IPAdapterNotFound, UnusableIPAdapter
from distriray.gang.config import HostConfig
from distriray.gang.messages import SegmentEnd, StopSignal
from distriray.gang.runner import SegmentRunner
from distriray.ip_adapters import MOST_IP_ADAPTERS, IPAdapterSpec
from distriray.models import ModelSpec
from distriray.picture import png
from tests.models import save_ip_adapter, tiny_ip_adapter, tiny_sd15, tiny_sdxl

from .fleet import FakeHost
from .runners import Gang, endings
from .test_dispatcher import Script, at, do, opened

STYLE = IPAdapterSpec(name="style", source="some/style")
LIKE = Image.effect_noise((128, 128), 90)
ASKED: dict[str, Any] = {"ip_adapters": [{"name": "style", "image": LIKE, "scale": 0.8}]}
LONG = 400


def test_pictures_are_put_once_and_survive_regrouping_and_a_dead_worker() -> None:
    async def scene() -> None:
        policy = Script([(0, 1), (0, 1, 2, 3)], every=LONG)
        async with FakeHost(4, policy, ip_adapters=[STYLE], **opened()) as host:
            job = host.accept(num_inference_steps=60, **ASKED)
            given = job.pictures
            assert [*given] == ["ip_adapters.0.image"]
            assert len(pickle.dumps((job.request, job.view()))) < len(png(LIKE)) / 2
            await at(job, 10)
            policy.at = 1
            job.yield_() and host.dispatcher._stop(job, StopSignal.YIELD)
            result = await job.ended
            assert [len(segment.workers) for segment in result.segments] == [2, 4]
            told = [pictures for worker in host.fleet.launched for _, pictures in worker.pictures]
            assert host.fleet.shared == 1 and told.count(given) == 2 and told.count(None) == 4
        async with FakeHost(1, ip_adapters=[STYLE], **opened()) as host:
            first, job = host.fleet.at(0), host.accept(num_inference_steps=200, **ASKED)
            given = job.pictures
            await at(job, 10)
            first.die()
            result = await job.ended
            assert result.repairs == 1 and result.segments[-1].first_step == 0
            assert [pictures for _, pictures in host.fleet.at(0).pictures] == [given]

    do(scene())


def test_an_unknown_name_is_refused_at_once_with_those_that_there_are() -> None:
    async def scene() -> None:
        async with FakeHost(1, ip_adapters=[STYLE]) as host:
            with pytest.raises(IPAdapterNotFound, match="no IP-Adapter 'face'; there is 'style'"):
                host.accept(ip_adapters=[{"name": "face", "image": LIKE}])
            with pytest.raises(InvalidRequest, match="ip_adapters names 'style' more than once"):
                host.accept(ip_adapters=ASKED["ip_adapters"] * 2)
        async with FakeHost(1, ip_adapters=[STYLE], limits={"max_ip_adapters": 0}) as host:
            with pytest.raises(InvalidRequest, match="ip_adapters names 1 IP-Adapter; the limit is 0"):
                host.accept(**ASKED)

    do(scene())


def test_a_pool_lists_each_name_once_and_not_too_many() -> None:
    with pytest.raises(ValidationError, match="'style'. are there more than once"):
        HostConfig(ip_adapters=(STYLE, STYLE))
    many = tuple(IPAdapterSpec(name=f"i{i}", source="some/one") for i in range(MOST_IP_ADAPTERS + 1))
    with pytest.raises(ValidationError, match="at most 16"):
        HostConfig(ip_adapters=many)


def runner_of(model: Path, *specs: IPAdapterSpec) -> SegmentRunner:
    named = ModelSpec(name=str(model))
    return SegmentRunner(named, torch.device("cpu"), HashStore(), timeout_s=10.0, ip_adapters=specs)


def test_a_worker_loads_what_is_listed_and_a_gang_draws_with_it(tiny_model: Path, tmp_path: Path) -> None:
    save_ip_adapter(tmp_path, tiny_ip_adapter(tiny_sdxl().unet, 1))
    style = IPAdapterSpec(name="style", source=str(tmp_path))
    assert runner_of(tiny_model, style)._denoiser.ip_adapters.names == ("style",)
    gang = Gang(tiny_model, 2)
    for runner in gang.runners:
        runner._denoiser.ip_adapters.load(style)

    def picture(**fields: Any) -> Image.Image:
        outcomes = gang.run(num_inference_steps=3, **fields)
        assert endings(outcomes) == [SegmentEnd.DONE] * 2
        (image,) = outcomes[0].images or ()
        return image

    plain, taking_after = picture(), picture(**ASKED)
    assert ImageChops.difference(plain, taking_after).getbbox()
    assert picture() == plain and picture(**ASKED) == taking_after
    zero = [{**ASKED["ip_adapters"][0], "scale": 0.0}]
    assert picture(ip_adapters=zero) == plain


def test_a_worker_does_not_start_with_one_that_does_not_fit(tiny_model: Path, tmp_path: Path) -> None:
    save_ip_adapter(tmp_path, tiny_ip_adapter(tiny_sd15().unet))
    with pytest.raises(UnusableIPAdapter, match="'style' cannot be used: .* and the model's"):
        runner_of(tiny_model, IPAdapterSpec(name="style", source=str(tmp_path)))
