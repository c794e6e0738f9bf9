"""Cost of an exchange between two processes on this machine: `python -m bench.collective`.

`swap` is one exchange in both directions at once; `round trip` is there and back, one after the other. The
10th percentile is what it costs when both processes have a core; beyond it, a busy machine's scheduler shows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import quantiles

import torch

from bench.report import Report
from distriray.collective import Communicator, launch

SIZES = {"1 KiB": 1 << 10, "64 KiB": 1 << 16, "1 MiB": 1 << 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--json", help="write the table here, too")
    arguments = parser.parse_args()
    columns = ("exchange", "10th percentile", "median", "90th percentile", "CPU of one rank")
    report = Report("Exchange between two ranks over gloo", columns, seed=0, settings=vars(arguments))
    for row in launch(2, measure, arguments.repeats)[0]:
        report.add(*row)
    report.publish(arguments.json)


def measure(communicator: Communicator, repeats: int) -> list[tuple[str, ...]]:
    """One row for each kind and size."""
    peer = 1 - communicator.rank
    rows = []
    for label, size in SIZES.items():
        ours, theirs = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)

        def swap(sent: torch.Tensor = ours, received: torch.Tensor = theirs) -> None:
            communicator.exchange({peer: sent}, {peer: received}).wait()

        def round_trip(sent: torch.Tensor = ours, received: torch.Tensor = theirs) -> None:
            steps = [({peer: sent}, {}), ({}, {peer: received})]
            for sends, receives in steps if communicator.rank == 0 else reversed(steps):
                communicator.exchange(sends, receives).wait()

        rows += [
            (f"swap {label}", *_time(swap, repeats)),
            (f"round trip {label}", *_time(round_trip, repeats)),
        ]
    return rows


def _time(exchange: Callable[[], None], repeats: int) -> list[str]:
    for _ in range(20):
        exchange()
    seconds = []
    cpu = time.process_time()
    for _ in range(repeats):
        start = time.perf_counter()
        exchange()
        seconds.append(time.perf_counter() - start)
    cpu = (time.process_time() - cpu) / repeats
    tenths = quantiles(seconds, n=10)
    return [f"{value * 1e6:.0f} us" for value in (tenths[0], tenths[4], tenths[8], cpu)]


if __name__ == "__main__":
    main()
