"""What a host believes of its speed before it has seen any."""

from __future__ import annotations

from .. import __version__
from ..routing.latency import Entry, Profile
from .config import HostConfig
from .messages import WorkerFacts

GUESSED_STEP_S = {"cpu": 1.0, "cuda": 0.1}
GUESSED_SPEEDUP = 0.8


def starting_profile(config: HostConfig, facts: WorkerFacts) -> Profile:
    """The profile that `config` names, else a guess: a gang of g is g ** 0.8 times as fast as one worker."""
    if config.profile is not None:
        return Profile.load(config.profile)
    height, width = facts.default_size
    step_s = GUESSED_STEP_S[facts.device.split(":")[0]]
    entries = tuple(
        Entry(gang=size, height=height, width=width, step_s=step_s / size**GUESSED_SPEEDUP)
        for size in config.sizes
    )
    return Profile(model=facts.model, device=facts.device, version=__version__, entries=entries)
