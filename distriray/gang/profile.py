"""What a host believes of its speed at start: a guess, or what it measured."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from .. import __version__
from ..requests import GenerationRequest
from ..routing.latency import Entry, Profile
from .config import HostConfig
from .messages import WorkerFacts

if TYPE_CHECKING:
    from .host import Host

GUESSED_STEP_S = {"cpu": 1.0, "cuda": 0.1}
GUESSED_SPEEDUP = 0.8
GUESSED_AUTO_WARMUP = 4
MEASURED_STEPS = 5


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
    """Draw with a gang of every size, one after the other, on a host that has nothing else to do."""
    config, facts = host.config, host.facts
    height, width = facts.default_size
    entries: list[Entry] = []
    moves_s: list[float] = []
    for size in config.sizes:
        if size > facts.max_gang(height):
            continue
        for steps in (1, _warmup(config) + MEASURED_STEPS):  # the first one warms up
            request = GenerationRequest(prompt="a lake", seed=0, num_inference_steps=steps, gang_size=size)
            result = await host.generate(request)
        segment, timings = result.segments[-1], result.timings
        step_s = segment.stale_step_s or segment.fresh_step_s
        assert step_s is not None
        entries.append(
            Entry(
                gang=size,
                height=height,
                width=width,
                step_s=step_s,
                sync_step_s=segment.fresh_step_s,
                prepare_s=timings.prepare_s,
                decode_s=timings.decode_s,
            )
        )
        moves_s.append(timings.waiting_s)
    return _profile(config, facts, tuple(entries), median(moves_s))


def _profile(
    config: HostConfig, facts: WorkerFacts, entries: tuple[Entry, ...], regroup_s: float = 0.0
) -> Profile:
    return Profile(
        model=facts.model,
        device=facts.device_name,
        version=__version__,
        entries=entries,
        regroup_s=regroup_s,
        warmup_steps=max(1, _warmup(config)),
    )


def _warmup(config: HostConfig) -> int:
    steps = config.parallel.warmup_steps
    return GUESSED_AUTO_WARMUP if steps == "auto" else steps
