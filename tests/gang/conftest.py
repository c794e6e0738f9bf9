"""One local Ray and one host of four CPU workers for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from distriray.config import ParallelConfig
from distriray.controls import ControlNetSpec
from distriray.gang import BlockingHost, HostConfig, open_host
from distriray.ip_adapters import IPAdapterSpec
from distriray.models import ModelSpec
from distriray.requests import GenerationRequest
from distriray.routing.policies.earliest_deadline import EarliestDeadlineFirst
from tests.adapters import write
from tests.gang.policies import Changeable
from tests.models import save_ip_adapter, tiny_controlnet, tiny_ip_adapter, tiny_sdxl


@pytest.fixture(scope="package")
def lora_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two adapters for the tiny model."""
    folder, pipeline = tmp_path_factory.mktemp("loras"), tiny_sdxl()
    write(folder / "ink.safetensors", pipeline, 1, text=True)
    write(folder / "neon.safetensors", pipeline, 2)
    return folder


@pytest.fixture(scope="package")
def controlnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a ControlNet for the tiny model."""
    folder = tmp_path_factory.mktemp("controlnet")
    tiny_controlnet(tiny_sdxl().unet, seed=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="package")
def ip_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an IP-Adapter for the tiny model, with its image encoder."""
    folder = tmp_path_factory.mktemp("ip-adapter")
    save_ip_adapter(folder, tiny_ip_adapter(tiny_sdxl().unet, 1))
    return folder


@pytest.fixture(scope="package")
def shared_host(
    tiny_model: Path, lora_dir: Path, controlnet: Path, ip_adapter: Path
) -> Iterator[BlockingHost]:
    config = HostConfig(
        model=ModelSpec(name=str(tiny_model)),
        lora_dir=lora_dir,
        controls=(ControlNetSpec(name="edges", source=str(controlnet)),),
        ip_adapters=(IPAdapterSpec(name="style", source=str(ip_adapter)),),
        workers=4,
        device="cpu",
        parallel=ParallelConfig(exchange="sync"),
        max_queue=4,
        timeout_s=20,
    )
    with open_host(config, policy=Changeable(), cpus=5) as host:  # one more for the hosts of single tests
        yield host


@pytest.fixture
def host(shared_host: BlockingHost) -> Iterator[BlockingHost]:
    """The shared host, which every test must leave as it found it: idle and whole."""
    yield shared_host
    policy_of(shared_host).change(EarliestDeadlineFirst())
    status = shared_host.status()
    assert not status.running and not status.waiting
    assert status.healthy and status.free_workers == 4


def policy_of(host: BlockingHost) -> Changeable:
    policy = host.host._dispatcher.policy
    assert isinstance(policy, Changeable)
    return policy


def ask(**fields: object) -> GenerationRequest:
    """A small, quick, reproducible request."""
    defaults = {"prompt": "a lake", "height": 128, "width": 128, "seed": 7, "num_inference_steps": 6}
    return GenerationRequest.parse({**defaults, **fields})
