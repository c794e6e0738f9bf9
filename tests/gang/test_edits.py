"""An edit on a host that plans ahead: it makes way for an urgent one, in gangs of processes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from distriray.config import ParallelConfig
from distriray.gang import BlockingHost, HostConfig, open_host
from distriray.gang.job import Job
from distriray.gang.segment_result import SegmentResult
from distriray.gang.speed import Moment, Speed
from distriray.models import ModelSpec
from distriray.results import GenerationResult
from distriray.routing.profile import Entry, Profile
from tests.gang.conftest import ask
from tests.gang.test_host import difference
from tests.models import save, tiny_flux2_klein

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

NOISE = Image.effect_noise((96, 120), 90)
CALM, URGENT = [NOISE.rotate(180), NOISE], [Image.linear_gradient("L").resize((64, 160))]
STEPS = 60


def edit(pictures: list[Image.Image], **fields: Any) -> Any:
    """An edit that shows what it is shown: of another picture it is another one."""
    references = [{"image": picture} for picture in pictures]
    return ask(**{"references": references, "guidance_scale": 20.0, "num_inference_steps": STEPS, **fields})


class Believing(Speed):
    """What a host believes of its workers, whatever they do: two that share cores are no faster than one."""

    def learn(self, job: Job, result: SegmentResult, began: Moment) -> None:
        pass


@pytest.fixture(scope="module")
def pair(shared_host: BlockingHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlockingHost]:
    """Two workers with FLUX.2 klein, of which their host believes that they share a step well."""
    folder = tmp_path_factory.mktemp("models") / "flux2-klein"
    save(tiny_flux2_klein(), folder)
    config = HostConfig(
        model=ModelSpec(name=str(folder)),
        workers=2,
        cpus_per_worker=0.5,
        device="cpu",
        parallel=ParallelConfig(exchange="sync"),
        timeout_s=20,
    )
    entries = tuple(
        Entry(gang=gang, height=128, width=128, step_s=step_s) for gang, step_s in ((1, 0.04), (2, 0.021))
    )
    believed = Profile(model="klein", device="cpu", version="1", entries=entries, regroup_s=0.01)
    with open_host(config) as host:
        host.host._dispatcher.speed = Believing(believed)
        yield host


def test_an_edit_makes_way_for_an_urgent_one_and_grows_again_and_each_has_its_own_pictures(
    pair: BlockingHost,
) -> None:
    urgently = {"num_inference_steps": 8, "gang_size": 1, "deadline_s": 1.0}
    alone = pair.generate(edit(CALM, gang_size=1))
    urgent_alone = pair.generate(edit(URGENT, **urgently))
    assert difference(alone, pair.generate(edit(URGENT, gang_size=1))) > 8

    async def scene() -> tuple[GenerationResult, GenerationResult]:
        calm = asyncio.ensure_future(pair.host.generate(edit(CALM, id="calm")))
        while not (running := pair.host.status().running) or running[0].step < 5:
            await asyncio.sleep(0.01)
        urgent = await pair.host.generate(edit(URGENT, id="urgent", **urgently))
        return await calm, urgent

    calm, urgent = pair.do(scene())
    assert [len(segment.workers) for segment in calm.segments] == [2, 1, 2]
    assert [s.first_step for s in calm.segments[1:]] == [s.last_step for s in calm.segments[:-1]]
    assert calm.segments[-1].last_step == STEPS
    assert difference(calm, alone) <= 1 and difference(urgent, urgent_alone) <= 1
