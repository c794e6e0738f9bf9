"""The time of one rank's share of a step, measured without its peers."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from diffusers import UNet2DConditionModel

from bench.exchange import SETTLING, unet_inputs
from bench.projection.links import Link, exposed_s
from bench.projection.peers import NotedPeers, Step, filled_once
from bench.published import placed
from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator
from distriray.parallel import engine_of


@dataclass(frozen=True)
class Share:
    """Steps of one rank: the first one, which is synchronous, and later ones, as the exchange has them.

    The first of the later ones is not timed: what it sends, the one after it waits for.
    """

    first: Step
    later: list[Step]

    @property
    def seconds(self) -> float:
        """Of a later step's arithmetic, the first of them left out."""
        return median(step.seconds for step in self.later[1:])

    def exposed(self, link: Link) -> float:
        """Seconds that `link` adds to a later step, beyond what is hidden."""
        return median(exposed_s(self.later, link)[1:])

    def step(self, link: Link) -> float:
        """Seconds of a later step."""
        return self.seconds + self.exposed(link)

    def image(self, link: Link, steps: int, warmup_steps: int) -> float:
        """Seconds of an image: a synchronous step waits for every one of its many transfers."""
        warm = min(warmup_steps, steps)
        waiting = sum(link.seconds(m.sent) for m in self.first.moments if m.kind == "launch")
        return warm * (self.seconds + waiting) + (steps - warm) * self.step(link)


def measure_share(
    unet: UNet2DConditionModel, rank: int, world_size: int, size: int, steps: int, config: ParallelConfig
) -> Share:
    """What rank `rank` of `world_size` does in a guided step at `size` pixels, its peers' buffers filled.

    Args:
        steps: later steps that are timed.
        config: with one synchronous step at most.
    """
    peers = NotedPeers(rank, world_size, unet.device)
    parallelize(unet, peers, config)
    taken = _steps(unet, peers, size, SETTLING + steps, fills_once=filled_once(config.mix))
    peers.close()  # nobody joins them again
    return Share(taken[0], taken[SETTLING - 1 :])


def measure_gang(
    unet: UNet2DConditionModel, communicator: Communicator, size: int, steps: int, config: ParallelConfig
) -> float:
    """Median seconds of a later step of a gang that is there."""
    parallelize(unet, communicator, config)
    engine = engine_of(unet)
    assert engine is not None
    inputs, seconds = step_inputs(unet, size), []
    with engine.image():
        for step in range(SETTLING + steps):
            engine.announce_more()
            unet(timestep=900 - step, **inputs)
            seconds.append(engine.statistics.seconds)
    return median(seconds[SETTLING:])


def _steps(
    unet: UNet2DConditionModel, peers: NotedPeers, size: int, count: int, fills_once: bool
) -> list[Step]:
    """Consecutive steps."""
    inputs, engine = step_inputs(unet, size), engine_of(unet)
    assert engine is not None
    taken = []
    with engine.image():
        for step in range(count):
            peers.fills = step == 0 or not fills_once
            engine.announce_more()
            peers.begin_step()
            unet(timestep=900 - step, **inputs)
            taken.append(peers.end_step())
    return taken


def step_inputs(unet: UNet2DConditionModel, size: int) -> dict[str, Any]:
    """Seeded inputs of one guided step at `size` pixels, where the U-Net computes and in its dtype."""
    return placed(unet_inputs(unet, size), unet)
