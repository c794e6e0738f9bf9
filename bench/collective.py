"""Cost of an exchange between processes on this machine: `python -m bench.collective`.

`swap` is one exchange of every rank with every other, in both directions at once; `round` goes from rank to
rank and back to the first, one after the other. The backends take turns within one run, so that a machine
whose speed drifts shifts them alike. The 10th percentile is what it costs when all processes have a core;
beyond it, a busy machine's scheduler shows.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import quantiles

import torch

from bench.arguments import add_backends, add_json
from bench.report import Report
from distriray.arguments import at_least
from distriray.collective import Communicator, all_gather, connect, launch, serve_store

SIZES = {"1 KiB": 1 << 10, "64 KiB": 1 << 16, "1 MiB": 1 << 20, "16 MiB": 1 << 24}
TURNS = 5
COLUMNS = ("ranks", "exchange", "backend", "10th percentile", "median", "90th percentile", "CPU of one rank")

Samples = dict[tuple[str, str], list[tuple[float, float]]]
"""By exchange and backend: seconds, and seconds of CPU."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_backends(parser)
    parser.add_argument("--ranks", type=at_least(2), nargs="+", default=[2, 4])
    parser.add_argument(
        "--repeats", type=at_least(10 * TURNS), default=400, help="of the small ones; 16 MiB: a tenth of it"
    )
    add_json(parser)
    arguments = parser.parse_args()
    report = Report("Exchange between ranks of one machine", COLUMNS, seed=0, settings=vars(arguments))
    served = serve_store("127.0.0.1")
    for ranks in arguments.ranks:
        samples = launch(ranks, measure, served.address, arguments.backends, arguments.repeats)[0]
        for (exchange, backend), taken in samples.items():
            tenths = quantiles([seconds for seconds, _ in taken], n=10)
            cpu = sum(cpu_s for _, cpu_s in taken) / len(taken)
            times = (f"{value * 1e6:.0f} us" for value in (tenths[0], tenths[4], tenths[8], cpu))
            report.add(str(ranks), exchange, backend, *times)
    report.publish(arguments.json)


def measure(communicator: Communicator, address: str, backends: list[str], repeats: int) -> Samples:
    """What each kind and size takes, by each backend."""
    rank, ranks = communicator.rank, communicator.world_size
    gangs = {
        name: connect(name, rank=rank, world_size=ranks, address=address, name=f"{name} of {ranks}")
        for name in backends
    }
    samples: Samples = defaultdict(list)
    for label, size in SIZES.items():
        tensors = list(torch.zeros(ranks, size, dtype=torch.uint8))

        def swap(gang: Communicator, tensors: list[torch.Tensor] = tensors) -> None:
            all_gather(gang, tensors).wait()

        def round_(gang: Communicator, tensors: list[torch.Tensor] = tensors) -> None:
            before, after = (rank - 1) % ranks, (rank + 1) % ranks
            steps = [({after: tensors[rank]}, {}), ({}, {before: tensors[before]})]
            for sends, receives in steps if rank == 0 else reversed(steps):
                gang.exchange(sends, receives).wait()

        count = repeats // (10 if size > 1 << 20 else 1) // TURNS
        for _ in range(TURNS):
            for name, gang in gangs.items():
                samples[f"swap {label}", name] += _time(swap, gang, count)
                samples[f"round {label}", name] += _time(round_, gang, count)
    for gang in gangs.values():
        gang.close()
    return dict(samples)


def _time(
    exchange: Callable[[Communicator], None], gang: Communicator, count: int
) -> list[tuple[float, float]]:
    for _ in range(3):
        exchange(gang)
    taken = []
    for _ in range(count):
        start, cpu = time.perf_counter(), time.process_time()
        exchange(gang)
        taken.append((time.perf_counter() - start, time.process_time() - cpu))
    return taken


if __name__ == "__main__":
    main()
