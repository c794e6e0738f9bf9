"""What old values hold up on a link, by a model: `python -m bench.overlap`.

A displaced step of SDXL's U-Net by one rank of a gang runs on torch's meta device (`bench.launches`). Its
operations take the time that a GPU would need for their bytes or for their arithmetic, whichever is longer,
and a launch. Its messages are replayed on links that carry them one after another, as NCCL does on a gang's
one stream (`bench.projection`): with old keys and values in few large parts, as many as `--buckets` says,
and in as many as a step has by default. Everything here is computed, and nothing is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any
from unittest.mock import patch

from diffusers.utils import logging
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.arguments import add_json, side
from bench.launches import Count, Counting, in_gang, standing_in
from bench.projection import peers as noted
from bench.projection.links import Link, add_links, exposed_s
from bench.projection.peers import Step
from bench.published import PUBLISHED
from bench.report import Report
from distriray.arguments import at_least, positive
from distriray.config import ExchangeMode

COLUMNS = (
    "size",
    "ranks",
    "exchange",
    "buckets",
    "exchanges",
    "MB sent",
    "link",
    "computed share, ms",
    "computed exposed, ms",
    "computed step, ms",
)
NAMES: tuple[ExchangeMode, ...] = ("sync", "displaced_attention", "displaced")
BYTES_PER_S, FLOPS, LAUNCH_S = 2.4e12, 500e12, 2e-6
"""Of an H100 in float16, and of one kernel of a graph: what large operations reach, by rule of thumb."""
STEPS = 8
"""Of an image; the last is looked at, whose old values have been on their way as in those that follow."""


@dataclass
class Clock(Count):
    """Count of launches, by which time goes on.

    Attributes:
        now_s: since the first of them.
        flops: of the operation that is under way.
    """

    now_s: float = 0.0
    flops: int = 0

    def add(self, *moved: Any) -> None:
        before = self.nbytes
        super().add(*moved)
        if len(moved) == 4:  # what stands in for attention
            query, key, *_ = moved
            self.flops = 4 * query.numel() * key.shape[2]
        self.now_s += LAUNCH_S + max((self.nbytes - before) / BYTES_PER_S, self.flops / FLOPS)
        self.flops = 0


class Arithmetic(TorchDispatchMode):
    """Tells a clock how much an operation computes."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self._clock.flops = formula(*args, **(kwargs or {}), out_val=output)
        return output


@contextmanager
def timing() -> Iterator[Clock]:
    """Let time go by what is launched within, for the notes that a rank's peers take too."""
    clock = Clock()
    with (
        patch.object(noted, "mark", lambda device: clock.now_s),
        standing_in(clock),
        Arithmetic(clock),
        Counting(clock),  # which is asked first, and counts when the operation is over
    ):
        yield clock


def steps_of(size: int, ranks: int, exchange: ExchangeMode, buckets: int | None) -> list[Step]:
    """Displaced steps of one rank, with guidance split, each after the other.

    Args:
        buckets: of old values; None for as many as there are by default.
    """
    model = PUBLISHED["sdxl"]
    network, inputs, engine, peers = in_gang(model, size, ranks, True, exchange, "gather")
    engine.exchanges.bucket_count = buckets
    steps = []
    with engine.image(), timing():
        for step in range(STEPS):
            engine.announce_more()
            peers.begin_step()
            model.call(network, model.timestep_on("meta", 900.0 - step), inputs)
            steps.append(peers.end_step())
    return steps[STEPS // 2 :]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=side, nargs="+", default=[1024, 2048, 3840], help="pixels of a side")
    parser.add_argument("--ranks", type=at_least(4), nargs="+", default=[4, 8])
    parser.add_argument("--buckets", type=positive, default=4, help="beside as many as by default")
    add_links(parser)
    add_json(parser)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    links = [link.name for link in arguments.links]
    report = Report(
        "bench.overlap: sdxl in float16 on a modelled H100, guidance split, computed and not measured",
        COLUMNS,
        seed=0,
        settings={**vars(arguments), "links": links},
    )
    for size, ranks, exchange in product(arguments.sizes, arguments.ranks, NAMES):
        known = list[Step]()
        for buckets in (arguments.buckets, None) if exchange != "sync" else (None,):
            steps = steps_of(size, ranks, exchange, buckets)
            if exchanges_of(steps[-1]) not in map(exchanges_of, known):  # else by default there are as many
                tabulate(report, size, ranks, exchange, buckets, steps, arguments.links)
            known.append(steps[-1])
    report.publish(arguments.json)


def exchanges_of(step: Step) -> int:
    """How often a step exchanges."""
    return sum(moment.kind == "launch" for moment in step.moments)


def tabulate(
    report: Report,
    size: int,
    ranks: int,
    exchange: ExchangeMode,
    buckets: int | None,
    steps: list[Step],
    links: list[Link],
) -> None:
    """A row for each link."""
    step = steps[-1]
    for link in links:
        exposed = exposed_s(steps, link)[-1]
        report.add(
            f"{size}x{size}",
            str(ranks),
            exchange,
            "-" if exchange == "sync" else str(buckets or "default"),
            str(exchanges_of(step)),
            f"{sum(step.sent.values()) / 1e6:.0f}",
            link.name,
            f"{1e3 * step.seconds:.2f}",
            f"{1e3 * exposed:.2f}",
            f"{1e3 * (step.seconds + exposed):.2f}",
        )


if __name__ == "__main__":
    main()
