"""What a host tells a router of itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

from distriray.gang.config import HostConfig
from distriray.gang.messages import WorkerFacts
from distriray.routing.latency import LatencyModel
from distriray.routing.router import HostState


@dataclass(frozen=True, slots=True)
class HostKnowledge:
    """The part of a report that seldom changes; `adapters` are the names that requests may have."""

    latency: LatencyModel
    facts: WorkerFacts
    config: HostConfig
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HostReport:
    """One host's answer to a router. Times in `state` count from the moment of the report, so that machines
    need not agree on a clock.

    Attributes:
        edition: changes with the knowledge. A router says which one it has of each host.
        knowledge: None where the router has this edition already.
    """

    state: HostState
    edition: str
    knowledge: HostKnowledge | None


def shifted(state: HostState, by_s: float) -> HostState:
    """`state` on a clock that shows `by_s` more."""
    return replace(
        state,
        published_s=state.published_s + by_s,
        capacity_beside_deadlines=tuple(
            step._replace(start_s=step.start_s + by_s) for step in state.capacity_beside_deadlines
        ),
        capacity_beside_all=tuple(
            step._replace(start_s=step.start_s + by_s) for step in state.capacity_beside_all
        ),
    )
