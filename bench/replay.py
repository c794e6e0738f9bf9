"""The host's part of a step of CUDA graphs, measured without a GPU: `python -m bench.replay`.

A rank of a published network does steps on torch's meta device, which computes nothing, with graphs that do
nothing when they are replayed. What is left is Python: what the engine asks before a step, what is said to
the peers between two graphs, and the gather. A GPU's own calls (launches, events, NCCL's) come on top of it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from diffusers.utils import logging

from bench.arguments import add_json, side
from bench.launches import Count, in_gang, standing_in, ways
from bench.published import PUBLISHED
from bench.report import Report
from distriray.arguments import at_least, positive
from distriray.parallel.graphs import Graph

COLUMNS = ("model", "guidance", "exchange", "attention", "graphs", "exchanges", "host, ms", "least, ms")


class Nothing:
    """A graph of which nothing is known but that it was made."""

    def capture_begin(self, pool: Any = None) -> None:
        pass

    def capture_end(self) -> None:
        pass

    def replay(self) -> None:
        pass


class Nothings:
    """Makes them, and counts."""

    def __init__(self) -> None:
        self.made = 0

    @contextmanager
    def capturing(self) -> Iterator[None]:
        yield

    def new(self) -> tuple[Graph, dict[str, Any]]:
        self.made += 1
        return Nothing(), {}

    def let_go(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", choices=PUBLISHED, nargs="+", default=list(PUBLISHED))
    parser.add_argument("--size", type=side, default=1024, help="pixels of a side")
    parser.add_argument("--ranks", type=at_least(2), default=8)
    parser.add_argument("--steps", type=positive, default=30, help="steps that are timed")
    add_json(parser)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    report = Report(
        f"bench.replay: a rank of {arguments.ranks} at {arguments.size}, on one core",
        COLUMNS,
        seed=0,
        settings=vars(arguments),
    )
    for name in arguments.models:
        model = PUBLISHED[name]
        halves = (True, False) if model.branches else (model.splits,)
        cases = [
            (split, *way)
            for split in dict.fromkeys(each and arguments.ranks % 2 == 0 for each in halves)
            for way in ways(model, arguments.ranks // (2 if split else 1))
        ]
        for split, exchange, attention in cases:
            network, inputs, engine, peers = in_gang(
                model, arguments.size, arguments.ranks, split, exchange, attention
            )
            graphs, seconds = Nothings(), []
            engine.capture_with(graphs)
            with standing_in(Count()), engine.image():
                for step in range(arguments.steps + 3):
                    engine.announce_more()
                    peers.begin_step()
                    timestep = model.timestep_on("meta", 900.0 - step)
                    began = time.perf_counter()
                    model.call(network, timestep, inputs)
                    seconds.append(time.perf_counter() - began)
            assert engine.graphs.obstacle is None, engine.graphs.obstacle
            launches = sum(moment.kind == "launch" for moment, _ in peers.marks)
            timed = [1e3 * second for second in seconds[3:]]
            report.add(
                model.name,
                ("split" if split else "together") if model.splits else "-",
                exchange,
                attention,
                str(graphs.made),
                str(launches),
                f"{median(timed):.1f}",
                f"{min(timed):.1f}",
            )
            report.print_last()
    report.publish(arguments.json)


if __name__ == "__main__":
    main()
