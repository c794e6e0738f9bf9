"""The comparison of the simulator with a host, on a host that only sleeps."""

import asyncio

import pytest

from bench.simulator_truth import compare, replay, trace
from distriray.routing.latency import LatencyModel
from distriray.routing.policies.baselines import FixedSize
from distriray.routing.profile import Entry, Profile
from distriray.routing.simulation.fleet import SimulatedFleet
from distriray.routing.simulation.simulator import simulate

MODEL = LatencyModel(
    Profile(model="m", device="d", version="1", entries=(Entry(gang=1, height=64, width=64, step_s=0.01),))
)


@pytest.mark.parametrize("pace", [1.0, 2.0])
def test_a_host_as_fast_as_its_profile_agrees_and_a_slower_one_does_not(pace):
    arrivals = trace(12, MODEL, (64, 64), steps=10, workers=2, seed=1)

    async def run():
        workers = asyncio.Semaphore(2)

        async def submit(arrival):
            async with workers:
                await asyncio.sleep(pace * 0.01 * arrival.steps)
            return []

        return await replay(arrivals, submit, workers=2)

    simulated = simulate(arrivals, FixedSize(1), MODEL, SimulatedFleet(workers=2, gang_sizes=(1,)))
    found = compare(asyncio.run(run()), simulated)
    assert (found["apart, %"] < 30) == (pace == 1.0)
