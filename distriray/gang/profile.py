"""The latency profile that a host starts from unless it has measured one: a guess."""

from __future__ import annotations

import json
from typing import Any

from distriray.config import ParallelConfig
from distriray.gang.config import HostConfig
from distriray.gang.devices import DEVICES
from distriray.gang.messages import WorkerFacts
from distriray.routing.profile import Entry, Profile
from distriray.version import __version__

GUESSED_SPEEDUP = 0.8
_TIMED: Any = {
    "model": {"dtype", "quantize", "offload_text"},
    "parallel": set(ParallelConfig.model_fields) - {"max_buffer_bytes"},
    "compile": True,
    "nccl_max_ctas": True,
}
"""What of a host's configuration the times of its profile depend on."""


def guessed_profile(config: HostConfig, facts: WorkerFacts) -> Profile:
    """A gang of g is taken to be g ** 0.8 times as fast as one worker, and to decode as long as it steps."""
    height, width = facts.default_size
    entries = []
    for size in config.sizes:
        step_s = DEVICES[facts.device_type].guessed_step_s / size**GUESSED_SPEEDUP
        entries.append(
            Entry(gang=size, height=height, width=width, guided=facts.guides, step_s=step_s, decode_s=step_s)
        )
    return make_profile(config, facts, tuple(entries)).model_copy(update={"guessed": True})


def make_profile(
    config: HostConfig,
    facts: WorkerFacts,
    entries: tuple[Entry, ...],
    regroup_s: float = 0.0,
    contention: tuple[tuple[int, float], ...] = (),
) -> Profile:
    """A profile of these measurements, for this model, device and version."""
    return Profile(
        model=facts.model,
        device=device_of(config, facts),
        version=__version__,
        entries=entries,
        regroup_s=regroup_s,
        warmup_steps=config.parallel.usual_warmup,
        contention=contention,
    )


def device_of(config: HostConfig, facts: WorkerFacts) -> str:
    """What a profile applies to: "N x device", the gangs lent, and what of the configuration times depend on.

    A gang that gains nothing by a profile is never tried: a size that it lacks would never be lent.
    """
    gangs = f"in gangs of {' '.join(map(str, config.sizes))}"
    timed = config.model_dump(mode="json", include=_TIMED, exclude_defaults=True)
    settings = {field: value for field, value in timed.items() if value}
    set_otherwise = f" with {json.dumps(settings)}" if settings else ""
    return f"{config.workers} x {facts.device_name} {gangs}{set_otherwise}"
