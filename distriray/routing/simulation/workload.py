"""Requests to simulate: their arrivals, sizes and deadlines."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from distriray.routing.latency import LatencyModel
from distriray.routing.profile import Entry, Profile

STEPS = 50
"""Of a request that says nothing else."""


class Arrival(BaseModel):
    """One request of a trace; a trace file holds one such JSON object a line, in order of `at_s`.

    `at_s` counts in seconds from the start and `deadline_s` from the arrival. Sizes are in pixels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    at_s: Annotated[float, Field(ge=0.0)]
    height: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    batch: Annotated[int, Field(ge=1)] = 1
    steps: Annotated[int, Field(ge=1)] = STEPS
    deadline_s: Annotated[float, Field(gt=0.0)] | None = None
    priority: int = 0
    gang_size: Annotated[int, Field(ge=1)] | None = None
    max_gang: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """A sort of request: its share of a mix (any scale) and its base deadline in seconds, if any."""

    height: int
    width: int
    deadline_s: float | None
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Workload:
    """A mix of kinds, their arrivals, and how tight their deadlines are.

    Attributes:
        rate: requests a second, on average.
        scale: factor on the base deadlines.
        burst: number that arrive at the same moment (1: Poisson arrivals; more: Poisson bursts).
    """

    kinds: tuple[Kind, ...]
    rate: float
    scale: float = 1.0
    burst: int = 1
    steps: int = STEPS

    def arrivals(self, count: int, seed: int) -> Iterator[Arrival]:
        """`count` requests, the same ones for the same seed."""
        draw = random.Random(seed)
        shares = [kind.share for kind in self.kinds]
        at = 0.0
        for i in range(count):
            if i % self.burst == 0:
                at += draw.expovariate(self.rate / self.burst)
            kind = draw.choices(self.kinds, shares)[0]
            deadline = None if kind.deadline_s is None else self.scale * kind.deadline_s
            yield Arrival.model_construct(
                at_s=at,
                height=kind.height,
                width=kind.width,
                batch=1,
                steps=self.steps,
                deadline_s=deadline,
                priority=0,
                gang_size=None,
                max_gang=None,
            )


def read_trace(path: Path | str) -> Iterator[Arrival]:
    """The requests of a trace file, one at a time; raises ValueError at a bad line, or one out of order."""
    last_s = 0.0
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                arrival = Arrival.model_validate(json.loads(line))
                if arrival.at_s < last_s:
                    raise ValueError(
                        f"line {number}: at_s {arrival.at_s:g} is before {last_s:g}; sort by at_s"
                    )
                last_s = arrival.at_s
                yield arrival


def kinds_of(profile: Profile) -> tuple[Kind, ...]:
    """One kind for each size in a profile; base deadlines are 1.2 times the fastest gang's time."""
    model = LatencyModel(profile)
    gangs = sorted({entry.gang for entry in profile.entries})
    sizes = sorted({(e.height, e.width) for e in profile.entries}, key=lambda size: (size[0] * size[1], size))
    return tuple(
        Kind(h, w, 1.2 * min(model.times(g, h, w, 1).run_s(0, STEPS) for g in gangs)) for h, w in sizes
    )


TRIAL_SECONDS: Mapping[int, Mapping[int, float]] = {
    512: {1: 1.2, 2: 1.2 / 1.35, 4: 1.2 / 1.45, 8: 1.2 / 1.4},
    1024: {1: 3.5, 2: 3.5 / 1.76, 4: 3.5 / 2.62, 8: 3.5 / 2.73},
    1536: {1: 9.0, 2: 9.0 / 1.85, 4: 9.0 / 3.3, 8: 9.0 / 5.0},
    2048: {1: 18.0, 2: 18.0 / 1.9, 4: 18.0 / 3.6, 8: 18.0 / 6.5},
}
"""Seconds an image of each side on each gang: an assumption to compare policies on, not a measurement."""

TRIAL_KINDS = (Kind(512, 512, 1.2), Kind(1024, 1024, 1.6), Kind(1536, 1536, 2.2), Kind(2048, 2048, 3.3))
SKEWED_KINDS = tuple(
    Kind(kind.height, kind.width, kind.deadline_s, share)
    for kind, share in zip(TRIAL_KINDS, (1.0, 2.0, 3.0, 4.0), strict=True)
)


def trial_profile(regroup_s: float = 0.02, sync_factor: float = 1.5) -> Profile:
    """The trial's times as a profile.

    Args:
        regroup_s: seconds to move a request to another gang.
        sync_factor: how much longer a synchronous step takes on more than one worker.
    """
    return Profile(
        model="trial",
        device="assumed",
        version="1",
        regroup_s=regroup_s,
        warmup_steps=1,
        entries=tuple(
            Entry(
                gang=gang,
                height=side,
                width=side,
                step_s=seconds / STEPS,
                sync_step_s=seconds / STEPS * (sync_factor if gang > 1 else 1.0),
            )
            for side, by_gang in TRIAL_SECONDS.items()
            for gang, seconds in by_gang.items()
        ),
    )
