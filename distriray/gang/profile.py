"""What a host believes of its speed at start: a guess, or what it measured."""

from __future__ import annotations

import asyncio
from statistics import median
from typing import TYPE_CHECKING

from .. import __version__
from ..requests import GenerationRequest, GenerationResult
from ..routing.latency import Entry, Profile
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

    As many gangs of a size draw at once as there is room for, as under load. How much faster a step is when
    fewer workers are busy is found with gangs of the least size.
    """
    config, facts = host.config, host.facts
    least, steps = config.sizes[0], max(1, _warmup(config)) + MEASURED_STEPS
    most = _gangs(config, least)
    await _draw(host, least, most, 1)  # the first one warms up
    counts = sorted({*(2**i for i in range(most.bit_length())), most})
    alone = {count: await _draw(host, least, count, steps) for count in counts}
    crowded_s = _step_s(alone[most])
    crowding = tuple((least * n, _step_s(results) / crowded_s) for n, results in alone.items())
    entries: list[Entry] = []
    moves_s: list[float] = []
    for size in config.sizes:
        if size > facts.max_gang(facts.default_size[0]):
            continue
        if size > least:
            await _draw(host, size, _gangs(config, size), 1)
        results = alone[most] if size == least else await _draw(host, size, _gangs(config, size), steps)
        entries.append(_entry(size, results))
        moves_s += [result.timings.waiting_s for result in results]
    return _profile(config, facts, tuple(entries), median(moves_s), crowding)


def _gangs(config: HostConfig, size: int) -> int:
    """How many gangs of `size` draw at once."""
    return min(config.workers // size, config.max_queue)


async def _draw(host: Host, size: int, count: int, steps: int) -> list[GenerationResult]:
    request = GenerationRequest(prompt="a lake", seed=0, num_inference_steps=steps, gang_size=size)
    alike = (request.model_copy(update={"id": f"profile {i}"}) for i in range(count))
    return await asyncio.gather(*(host.generate(request) for request in alike))


def _entry(size: int, results: list[GenerationResult]) -> Entry:
    fresh = [s for r in results if (s := r.segments[-1].fresh_step_s) is not None]
    return Entry(
        gang=size,
        height=results[0].height,
        width=results[0].width,
        step_s=_step_s(results),
        sync_step_s=median(fresh) if fresh else None,
        prepare_s=median(r.timings.prepare_s + r.timings.waiting_s for r in results),
        decode_s=median(r.timings.decode_s for r in results),
    )


def _step_s(results: list[GenerationResult]) -> float:
    """Median seconds of a displaced step; of a synchronous one where there is no other."""
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
