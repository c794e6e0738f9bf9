"""The latency profile that a host measures by drawing."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from statistics import fmean, median

from distriray.gang.admission import admit, example
from distriray.gang.config import HostConfig
from distriray.gang.messages import WorkerFacts
from distriray.gang.profile import device_of, make_profile
from distriray.requests import GenerationRequest
from distriray.results import GenerationResult
from distriray.routing.profile import Entry, Profile
from distriray.version import __version__

MEASURED_STEPS = 8
CHOOSING_STEPS = 5
"""Of a gang's first image, from which `auto` chooses what a second one is drawn in. That is a trial, and so
may a third one be: those that are measured are drawn as later ones are."""

log = logging.getLogger("ray.serve.distriray")

Generate = Callable[[GenerationRequest], Awaitable[GenerationResult]]


async def keep_profile(folder: Path, config: HostConfig, facts: WorkerFacts, generate: Generate) -> Profile:
    """The profile of this model, device and version in `folder`; measured and kept there if there is none.

    One that cannot be read is measured again; that one cannot be kept does not keep a host from starting.
    """
    path = Profile.path(folder, facts.model, device_of(config, facts), __version__)
    try:
        return Profile.load(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.warning("profile %s cannot be read and is measured again: %s", path, error)
    profile = await calibrate(config, facts, generate)
    try:
        profile.save(path)
    except OSError as error:
        log.warning("profile %s cannot be kept; this host uses it all the same: %s", path, error)
    return profile


async def calibrate(config: HostConfig, facts: WorkerFacts, generate: Generate) -> Profile:
    """A profile measured by drawing with gangs of every size, on a host that has nothing else to do.

    As under load, all workers are busy meanwhile: with gangs of the same size, and then with lone ones, which
    do not wait for each other and so take more of what they share. How much faster a step is when fewer
    workers are busy is found with gangs of the least size.
    """
    guided = admit(example(facts), config, facts, limited=False).guided
    least, interval = config.sizes[0], config.parallel.cache_interval
    steps = config.parallel.usual_warmup + math.ceil(MEASURED_STEPS / interval) * interval
    warming = (CHOOSING_STEPS, steps, steps) if config.parallel.exchange == "auto" else (1,)
    most = config.workers // least
    for warm in warming if least > 1 else (1,):  # a lone worker has nothing to choose
        await _draw(generate, facts, [least] * most, warm)
    counts = sorted({*(2**i for i in range(most.bit_length())), most})
    alone = {count: await _draw(generate, facts, [least] * count, steps) for count in counts}
    full_s = _step_s(alone[most])
    contention = tuple((least * n, _step_s(results) / full_s) for n, results in alone.items())
    entries = [_entry(least, guided, [alone[most]])]
    moves_s: list[float] = []
    for size in config.sizes[1:]:
        if size > facts.max_gang(facts.default_size[0]):
            continue
        crowds = [[size] * (config.workers // size)]
        if config.workers - size >= least:
            crowds.append([size] + [least] * ((config.workers - size) // least))
        for warm in warming:
            await _draw(generate, facts, crowds[0], warm)
        runs = [await _draw(generate, facts, crowd, steps) for crowd in crowds]
        entries.append(_entry(size, guided, [[r for r in run if r.gang_size == size] for run in runs]))
        moves_s += [result.timings.waiting_s for run in runs for result in run]
    moves_s = moves_s or [result.timings.waiting_s for result in alone[most]]
    return make_profile(config, facts, tuple(entries), median(moves_s), contention)


async def _draw(
    generate: Generate, facts: WorkerFacts, gangs: Sequence[int], steps: int
) -> list[GenerationResult]:
    """One image by a gang of each of these sizes, all at once."""
    requests = [
        example(facts, id=f"profile {i}", seed=0, num_inference_steps=steps, gang_size=size)
        for i, size in enumerate(gangs)
    ]
    return await asyncio.gather(*map(generate, requests))


def _entry(size: int, guided: bool, runs: Sequence[Sequence[GenerationResult]]) -> Entry:
    """The mean over runs of what is usual in each; the first one is by gangs alike, which decode together."""
    fresh = [[s for r in run if (s := r.segments[-1].fresh_step_s) is not None] for run in runs]
    return Entry(
        gang=size,
        height=runs[0][0].height,
        width=runs[0][0].width,
        guided=guided,
        step_s=fmean(_step_s(run) for run in runs),
        sync_step_s=fmean(map(median, fresh)) if all(fresh) else None,
        prepare_s=fmean(median(r.timings.prepare_s + r.timings.waiting_s for r in run) for run in runs),
        decode_s=median(r.timings.decode_s for r in runs[0]),
    )


def _step_s(results: Sequence[GenerationResult]) -> float:
    """Seconds of a displaced step; of a synchronous one where there is no other."""
    segments = [segment for result in results for segment in result.segments]
    return median(step_s for s in segments if (step_s := s.stale_step_s or s.fresh_step_s) is not None)
