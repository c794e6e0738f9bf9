"""A host whose gangs compute one of two steps whole, in gangs of processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from distriray.config import ParallelConfig
from distriray.errors import UnsupportedModel
from distriray.gang import BlockingHost, HostConfig, open_host
from distriray.models import ModelSpec
from tests.gang.conftest import ask
from tests.gang.test_host import difference
from tests.models import save, tiny_sd3

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def config_of(model: Path) -> HostConfig:
    return HostConfig(
        model=ModelSpec(name=str(model)),
        workers=2,
        cpus_per_worker=0.25,
        device="cpu",
        parallel=ParallelConfig(exchange="sync", cache_interval=2),
        timeout_s=20,
    )


@pytest.fixture(scope="module")
def pair(shared_host: BlockingHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlockingHost]:
    """Two workers with Stable Diffusion 3."""
    folder = tmp_path_factory.mktemp("models") / "sd3"
    save(tiny_sd3(), folder)
    with open_host(config_of(folder)) as host:
        yield host


def test_a_gang_draws_what_one_worker_does_and_says_what_its_steps_take(pair: BlockingHost) -> None:
    alone, together = (
        pair.generate(ask(gang_size=gang, num_inference_steps=12, guidance_scale=20.0)) for gang in (1, 2)
    )
    assert difference(alone, together) <= 1
    for result in (alone, together):
        (segment,) = result.segments
        assert segment.fresh_step_s and segment.stale_step_s, "those before the turns, and those in turn"


def test_a_host_does_not_start_with_a_model_that_has_no_short_steps(
    shared_host: BlockingHost, tiny_model: Path
) -> None:
    said = "cache_interval is for transformers"
    with pytest.raises(UnsupportedModel, match=said), open_host(config_of(tiny_model)):
        pass
