"""Which device a worker computes on."""

from __future__ import annotations

import pytest

from distriray.gang.config import HostConfig
from distriray.gang.devices import DEVICES, place_of
from distriray.gang.worker import Worker


@pytest.mark.parametrize(
    ("gpu", "listed", "gpus", "place"),
    [
        (3, "3", 1, 0),  # as Ray does it: each worker sees its own
        ("GPU-5f0e", "GPU-5f0e", 1, 0),
        (0, None, 2, 0),  # all workers see all
        (1, None, 2, 1),
        ("4", "2, 4", 2, 1),
        (1, None, 1, 0),  # Ray was told of more than there are
        (5, None, 4, 1),
        (1, None, 0, 0),  # none: torch says so
    ],
)
def test_a_worker_computes_on_the_gpu_that_ray_reserved(
    gpu: int | str, listed: str | None, gpus: int, place: int
) -> None:
    environment = {} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}
    assert place_of(gpu, environment, gpus) == place


@pytest.mark.parametrize(("device", "beside"), [("cpu", True), ("cuda", False)])
def test_a_worker_forms_gangs_beside_what_it_computes_unless_all_must_rest(device: str, beside: bool) -> None:
    worker = Worker(HostConfig(workers=1), device, "nowhere:1")
    assert (worker._linking is not worker._compute) is beside is not DEVICES[device].links_at_rest
