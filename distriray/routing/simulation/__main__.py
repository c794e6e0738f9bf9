"""`python -m distriray.routing.simulation`: compare policies on simulated hosts, as a table and a plot."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distriray.arguments import non_negative_number, positive, positive_number, writable
from distriray.routing.buddy import check_gang_sizes
from distriray.routing.latency import LatencyModel
from distriray.routing.profile import Profile
from distriray.routing.simulation.comparison import LoadCase, Row, contenders, measure
from distriray.routing.simulation.figures import plot, table
from distriray.routing.simulation.fleet import SimulatedFleet
from distriray.routing.simulation.simulator import simulate
from distriray.routing.simulation.workload import (
    SKEWED_KINDS,
    TRIAL_KINDS,
    Kind,
    Workload,
    kinds_of,
    read_trace,
    trial_profile,
)

WORKLOADS: dict[str, tuple[tuple[Kind, ...], int]] = {
    "uniform": (TRIAL_KINDS, 1),
    "skewed": (SKEWED_KINDS, 1),
    "bursts": (TRIAL_KINDS, 20),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for and print the table."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if max(options.gang_sizes) > options.workers:
        parser.error(
            f"--gang-sizes {max(options.gang_sizes)} exceeds the {options.workers} workers of a host"
        )
    try:
        check_gang_sizes(options.gang_sizes)
        profile = (
            Profile.load(options.profile)
            if options.profile
            else trial_profile(options.regroup_s, options.sync)
        )
        if options.trace and not sum(1 for _ in read_trace(options.trace)):
            parser.error(f"--trace {options.trace} has no request")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    model, sizes = LatencyModel(profile), tuple(options.gang_sizes)
    fleet = SimulatedFleet(
        hosts=options.hosts,
        workers=options.workers,
        gang_sizes=sizes,
        routers=options.routers,
        refuse=options.refuse,
    )
    kinds = kinds_of(profile) if options.profile else None
    if options.trace:
        cases = [LoadCase(str(options.trace), Workload((), 0.0), model, sizes)]
    else:
        cases = [
            _case(workload, rate, scale, kinds, model, sizes)
            for workload in options.workloads
            for rate in options.rates
            for scale in options.scales
        ]
    offered = contenders(cases[0])
    if unknown := [name for name in options.policies or () if name not in offered]:
        parser.error(f"no policies {unknown}; use some of {list(offered)}")
    rows: list[Row] = []
    for case in cases:
        for name in options.policies or offered:
            if options.trace:
                report = simulate(read_trace(options.trace), offered[name](), model, fleet, options.seed)
                rows.append({"policy": name, **report.row()})
            else:
                seeds = range(options.seed, options.seed + options.seeds)
                rows.append(measure(case, name, fleet, options.requests, seeds))
    print(table(rows))
    if options.json:
        meta = {"command": "python -m distriray.routing.simulation " + " ".join(arguments or sys.argv[1:])}
        options.json.write_text(json.dumps(meta | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(rows, options.plot)
    return 0


def _case(
    name: str,
    rate: float,
    scale: float,
    kinds: tuple[Kind, ...] | None,
    model: LatencyModel,
    sizes: tuple[int, ...],
) -> LoadCase:
    mix, burst = WORKLOADS[name]
    if kinds is not None:  # the profile's sizes; a skewed mix has as many of the n-th as n says
        mix = tuple(replace(k, share=n if name == "skewed" else 1.0) for n, k in enumerate(kinds, 1))
    return LoadCase(name, Workload(mix, rate, scale, burst), model, sizes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m distriray.routing.simulation", description=__doc__)
    add = parser.add_argument
    add("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    add("--rates", nargs="+", type=positive_number, default=[0.3, 0.6, 0.9], help="requests a second")
    add("--scales", nargs="+", type=positive_number, default=[1.0, 1.2, 1.5], help="of the base deadlines")
    add("--policies", nargs="+", help="names as in the table; all by default")
    add("--requests", type=positive, default=1000, help="of each run")
    add("--seed", type=int, default=1)
    add("--seeds", type=positive, default=3, help="runs of each case, with seeds from --seed on")
    add("--hosts", type=positive, default=1)
    add("--workers", type=positive, default=8, help="of each host")
    add("--gang-sizes", nargs="+", type=positive, default=[1, 2, 4, 8])
    add("--routers", type=positive, default=1)
    add("--refuse", action="store_true", help="refuse what no host can finish in time")
    add("--profile", type=Path, help="measured times; without it, assumed ones")
    add("--regroup-s", type=non_negative_number, default=0.02, help="of the assumed times")
    add("--sync", type=positive_number, default=1.5, help="a synchronous step over a displaced one, assumed")
    add("--trace", type=Path, help="JSON lines of requests, in place of workloads")
    add("--json", type=writable, help="write the rows here")
    add("--plot", type=writable, help="write deadlines met over the rate here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
