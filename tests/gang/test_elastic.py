"""A host that plans ahead, on real workers: it measures itself once, and everyone ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from distriray.config import ParallelConfig
from distriray.gang import BlockingHost, HostConfig, open_host
from distriray.models import ModelSpec
from distriray.requests import GenerationRequest
from distriray.results import GenerationResult
from distriray.routing.profile import Entry, Profile
from tests.gang.conftest import ask
from tests.gang.test_host import difference

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


class Elastic(NamedTuple):
    """A host that plans ahead.

    Attributes:
        measured: by the host that started before it, and had no profile.
        given: the profile that this one found.
    """

    host: BlockingHost
    measured: Profile
    given: Profile


@pytest.fixture(scope="module")
def started(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elastic]:
    """The second host of a folder of profiles; it believes that a gang of 2 is nearly twice as fast."""
    folder = tmp_path_factory.mktemp("profiles")
    config = HostConfig(
        model=ModelSpec(name=str(tiny_model)),
        workers=2,
        cpus_per_worker=0.5,
        device="cpu",
        policy="elastic",
        profiles=folder,
        parallel=ParallelConfig(exchange="sync"),
        timeout_s=20,
    )
    with open_host(config, cpus=5) as host:
        (path,) = folder.iterdir()
        measured = Profile.load(path)
        assert host.host.latency.profile == measured
        assert not host.status().outcomes and host.status().predictions.count == 0
    believed = tuple(
        Entry(gang=gang, height=128, width=128, step_s=step_s) for gang, step_s in ((1, 0.03), (2, 0.016))
    )
    given = measured.model_copy(update={"regroup_s": 0.01, "entries": believed, "contention": ()})
    given.save(path)
    with open_host(config, cpus=5) as host:
        assert host.host.latency.profile == given
        assert [Profile.load(path) for path in folder.iterdir()] == [given]
        yield Elastic(host, measured, given)


@pytest.fixture
def elastic(started: Elastic) -> BlockingHost:
    return started.host


def test_a_profile_is_measured_once_and_used_at_the_next_start(started: Elastic) -> None:
    measured = started.measured
    assert [entry.gang for entry in measured.entries] == [1, 2]
    assert {busy for busy, _ in measured.contention} == {1, 2} and measured.contention[-1] == (2, 1.0)
    assert started.given != measured


def test_an_urgent_request_takes_the_workers_and_the_other_goes_on_where_it_was(
    elastic: BlockingHost,
) -> None:
    steps = 120
    alone = elastic.generate(ask(num_inference_steps=steps, gang_size=1))
    before = elastic.status().regroupings

    async def scene() -> tuple[GenerationResult, GenerationResult]:
        calm = asyncio.ensure_future(elastic.host.generate(ask(id="calm", num_inference_steps=steps)))
        while not (running := elastic.host.status().running) or running[0].step < 5:
            await asyncio.sleep(0.01)
        urgent = await elastic.host.generate(ask(id="urgent", gang_size=2, deadline_s=0.3))
        return await calm, urgent

    calm, urgent = elastic.do(scene())
    assert [segment.workers for segment in urgent.segments] == [(0, 1)]
    assert len(calm.segments) > 1
    assert [s.first_step for s in calm.segments[1:]] == [s.last_step for s in calm.segments[:-1]]
    assert difference(calm, alone) <= 1
    assert elastic.status().regroupings - before >= len(calm.segments) - 1


def test_all_of_a_mixed_crowd_end_and_their_predictions_are_kept(elastic: BlockingHost) -> None:
    before = elastic.status()

    def one(i: int) -> GenerationRequest:
        deadline_s = (None, 1.0, 5.0)[i % 3]
        return ask(num_inference_steps=10 + 7 * (i % 4), deadline_s=deadline_s, priority=i % 2, seed=i)

    async def scene() -> list[GenerationResult]:
        tasks = []
        for i in range(18):
            tasks.append(asyncio.ensure_future(elastic.host.generate(one(i))))
            await asyncio.sleep(0.05 * (i % 3))
        return await asyncio.gather(*tasks)

    results = elastic.do(scene())
    assert [result.seeds for result in results] == [[i] for i in range(18)]
    status = elastic.status()
    assert status.outcomes["finished"] - before.outcomes.get("finished", 0) == 18
    assert status.predictions.count - before.predictions.count == 18
    assert status.predictions.ratio_p50 is not None and status.predictions.ratio_p50 > 0
    assert not status.running and not status.waiting and status.free_workers == 2
    assert elastic.host.latency.step_s(1, 128, 128, 1) != 0.03  # what it saw corrected what it believed
