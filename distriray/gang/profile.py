"""What a host believes of its speed at start: a guess, or what it measured."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING

from ..requests import GenerationRequest, GenerationResult
from ..routing.latency import Entry, Profile
from ..version import __version__
from .config import HostConfig
from .messages import WorkerFacts

if TYPE_CHECKING:
    from .host import Host

GUESSED_STEP_S = {"cpu": 1.0, "cuda": 0.1}
GUESSED_SPEEDUP = 0.8
GUESSED_AUTO_WARMUP = 4
MEASURED_STEPS = 8


def guessed_profile(config: HostConfig, facts: WorkerFacts) -> Profile:
    """A gang of g is taken to be g ** 0.8 times as fast as one worker."""
    height, width = facts.default_size
    step_s = GUESSED_STEP_S[facts.device.split(":")[0]]
    entries = tuple(
        Entry(gang=size, height=height, width=width, step_s=step_s / size**GUESSED_SPEEDUP)
        for size in config.sizes
    )
    return _profile(config, facts, entries)


async def measure(host: Host) -> Profile:
    """Draw with gangs of every size, on a host that has nothing else to do.

    As under load, all workers are busy meanwhile: with gangs of the same size, and then with lone ones, which
    do not wait for each other and so take more of what they share. How much faster a step is when fewer
    workers are busy is found with gangs of the least size.
    """
    config, facts = host.config, host.facts
    least, steps = config.sizes[0], max(1, _warmup(config)) + MEASURED_STEPS
    most = config.workers // least
    await _draw(host, [least] * most, 1)  # the first one warms up
    counts = sorted({*(2**i for i in range(most.bit_length())), most})
    alone = {count: await _draw(host, [least] * count, steps) for count in counts}
    crowded_s = _step_s(alone[most])
    crowding = tuple((least * n, _step_s(results) / crowded_s) for n, results in alone.items())
    entries = [_entry(least, [alone[most]])]
    moves_s: list[float] = []
    for size in config.sizes[1:]:
        if size > facts.max_gang(facts.default_size[0]):
            continue
        crowds = [[size] * (config.workers // size)]
        if config.workers - size >= least:
            crowds.append([size] + [least] * ((config.workers - size) // least))
        await _draw(host, crowds[0], 1)
        runs = [await _draw(host, crowd, steps) for crowd in crowds]
        entries.append(_entry(size, [[r for r in run if r.gang_size == size] for run in runs]))
        moves_s += [result.timings.waiting_s for run in runs for result in run]
    moves_s = moves_s or [result.timings.waiting_s for result in alone[most]]
    return _profile(config, facts, tuple(entries), median(moves_s), crowding)


async def _draw(host: Host, gangs: Sequence[int], steps: int) -> list[GenerationResult]:
    """One image by a gang of each of these sizes, all at once, or as many as may wait."""
    requests = [
        GenerationRequest(
            id=f"profile {i}", prompt="a lake", seed=0, num_inference_steps=steps, gang_size=size
        )
        for i, size in enumerate(gangs[: host.config.max_queue])
    ]
    return await asyncio.gather(*(host.generate(request) for request in requests))


def _entry(size: int, runs: Sequence[Sequence[GenerationResult]]) -> Entry:
    """The mean over runs of what is usual in each; the first one is by gangs alike, which decode together."""
    fresh = [[s for r in run if (s := r.segments[-1].fresh_step_s) is not None] for run in runs]
    return Entry(
        gang=size,
        height=runs[0][0].height,
        width=runs[0][0].width,
        step_s=fmean(_step_s(run) for run in runs),
        sync_step_s=fmean(map(median, fresh)) if all(fresh) else None,
        prepare_s=fmean(median(r.timings.prepare_s + r.timings.waiting_s for r in run) for run in runs),
        decode_s=median(r.timings.decode_s for r in runs[0]),
    )


def _step_s(results: Sequence[GenerationResult]) -> float:
    """Seconds of a displaced step; of a synchronous one where there is no other."""
    last = [result.segments[-1] for result in results]
    return median(step_s for s in last if (step_s := s.stale_step_s or s.fresh_step_s) is not None)


def _profile(
    config: HostConfig,
    facts: WorkerFacts,
    entries: tuple[Entry, ...],
    regroup_s: float = 0.0,
    crowding: tuple[tuple[int, float], ...] = (),
) -> Profile:
    return Profile(
        model=facts.model,
        device=device_of(config, facts),
        version=__version__,
        entries=entries,
        regroup_s=regroup_s,
        warmup_steps=max(1, _warmup(config)),
        crowding=crowding,
    )


def device_of(config: HostConfig, facts: WorkerFacts) -> str:
    """What a profile holds for: so many workers side by side on such devices."""
    return f"{config.workers} x {facts.device_name}"


def _warmup(config: HostConfig) -> int:
    steps = config.parallel.warmup_steps
    return GUESSED_AUTO_WARMUP if steps == "auto" else steps
