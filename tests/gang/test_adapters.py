"""Requests with other adapters at once on one host, one of whose workers dies."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from distriray.errors import AdapterNotFound, UnusableAdapter
from distriray.gang import BlockingHost
from distriray.results import GenerationResult
from tests.adapters import write
from tests.gang.conftest import ask, policy_of
from tests.gang.policies import Shuffle
from tests.gang.test_faults import kill_one_at, whole
from tests.gang.test_host import difference
from tests.models import tiny_sdxl

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

INK, NEON = {"name": "ink", "scale": 0.8}, {"name": "neon", "scale": -0.5}
SETS: dict[str, list[Any]] = {"plain": [], "ink": [INK], "neon": [NEON], "both": [INK, NEON]}
STEPS = 40


def test_each_is_drawn_with_its_own_though_they_regroup_and_a_worker_is_killed(host: BlockingHost) -> None:
    untouched = host.generate(ask(gang_size=1, num_inference_steps=STEPS))
    alone = {
        name: host.generate(ask(gang_size=1, loras=loras, num_inference_steps=STEPS))
        for name, loras in SETS.items()
    }
    assert alone["plain"].images[0].tobytes() == untouched.images[0].tobytes()
    assert len({result.images[0].tobytes() for result in alone.values()}) == len(SETS)

    async def scene() -> dict[str, GenerationResult]:
        policy_of(host).change(Shuffle(seed=3))
        tasks = {
            name: asyncio.ensure_future(
                host.host.generate(ask(id=name, loras=loras, num_inference_steps=STEPS))
            )
            for name, loras in SETS.items()
        }
        await kill_one_at(host, "both", 5, 0)
        results = {name: await task for name, task in tasks.items()}
        await whole(host)
        return results

    results = host.do(scene())
    assert sum(result.repairs for result in results.values()) >= 1
    assert sum(len(result.segments) for result in results.values()) > len(SETS) + 1
    apart = {name: difference(result, alone[name]) for name, result in results.items()}
    assert max(apart.values()) <= 1, apart
    assert results["both"].timings.adapters_s > 0
    again = host.generate(ask(gang_size=1, num_inference_steps=STEPS))
    assert again.images[0].tobytes() == untouched.images[0].tobytes()
    held = [worker.adapters for worker in host.status().workers]
    assert any(set(adapters.names) == {"ink", "neon"} for adapters in held)


def test_a_file_that_comes_while_the_host_runs_can_be_asked_for(host: BlockingHost, lora_dir: Path) -> None:
    with pytest.raises(AdapterNotFound, match="no adapter 'late'; there is 'ink', 'neon'"):
        host.generate(ask(loras=[{"name": "late"}]))
    try:
        write(lora_dir / "late.safetensors", tiny_sdxl(), 3)
        drawn = host.generate(ask(loras=[{"name": "late"}]))
        assert difference(drawn, host.generate(ask())) > 1
        write(lora_dir / "late.safetensors", tiny_sdxl(), 3, lambda weights: weights.popitem())
        with pytest.raises(UnusableAdapter, match="'late' does not fit the model"):
            host.generate(ask(gang_size=2, loras=[{"name": "late"}]))
    finally:
        (lora_dir / "late.safetensors").unlink()
    assert host.status().healthy
