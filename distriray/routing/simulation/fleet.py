"""The size of a simulated fleet."""

from __future__ import annotations

from dataclasses import dataclass

from distriray.routing.router import CHOICES


@dataclass(frozen=True, slots=True)
class SimulatedFleet:
    """A fleet to simulate: `hosts` times `workers`, lent as `gang_sizes`.

    Attributes:
        routers: requests come to each of them in turn; none knows what the others sent.
        choices: hosts that a router asks and compares for each request, drawn from all.
        refresh_s: a host that was asked within this time is not asked again.
        max_waiting: a host's bound on its queue.
        refuse: whether a request is refused whose deadline no host can meet.
        decodes_together: whether all workers of a gang decode, or one of them while the others are idle.
        noise: relative spread (lognormal) of a segment's speed about the truth.
    """

    hosts: int = 1
    workers: int = 8
    gang_sizes: tuple[int, ...] = (1, 2, 4, 8)
    routers: int = 1
    choices: int = CHOICES
    refresh_s: float = 0.25
    max_waiting: int = 100_000
    refuse: bool = False
    decodes_together: bool = True
    noise: float = 0.0
