"""`python -m distriray.routing.simulate`: compare policies on simulated hosts, as a table and a plot."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .latency import LatencyModel, Profile
from .policies import POLICIES
from .policies.baselines import FixedSize, Leases, SizePerShape
from .policy import HostPolicy
from .simulator import Fleet, simulate
from .workload import SKEWED_KINDS, TRIAL_KINDS, Kind, Workload, kinds_of, read_trace, trial_profile

Row = dict[str, Any]

WORKLOADS: dict[str, tuple[tuple[Kind, ...], int]] = {
    "uniform": (TRIAL_KINDS, 1),
    "skewed": (SKEWED_KINDS, 1),
    "bursts": (TRIAL_KINDS, 20),
}
COLUMNS = (
    "workload",
    "rate",
    "scale",
    "policy",
    "deadlines met %",
    "± %",
    "p50 s",
    "p95 s",
    "p99 s",
    "GPU-s/image",
    "regroupings/image",
    "utilisation %",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One workload at one load, before the choice of a policy."""

    name: str
    workload: Workload
    model: LatencyModel
    gang_sizes: tuple[int, ...]


def contenders(case: Case) -> dict[str, Callable[[], HostPolicy]]:
    """The baselines that can serve a case, and every policy that a host can be configured with, by name."""
    sizes = {(k.height, k.width, 1): _smallest_in_time(case, k) for k in case.workload.kinds}
    made: dict[str, Callable[[], HostPolicy]] = {
        f"fixed {size}": partial(FixedSize, size) for size in case.gang_sizes
    }
    if sizes:
        made["per shape"] = lambda: SizePerShape(sizes, backfill=False)
        made["per shape, backfill"] = lambda: SizePerShape(sizes, backfill=True)
    made["leases"] = Leases
    made["leases, late last"] = lambda: Leases(late_last=True)
    return made | POLICIES


def _smallest_in_time(case: Case, kind: Kind) -> int:
    """The smallest gang that meets a kind's deadline without waiting, or else the fastest."""
    workload = case.workload
    seconds = {
        g: case.model.times(g, kind.height, kind.width, 1).run_s(0, workload.steps) for g in case.gang_sizes
    }
    limit = workload.scale * (kind.deadline_s or 0.0)
    return next((g for g in case.gang_sizes if seconds[g] <= limit), min(seconds, key=seconds.__getitem__))


def measure(case: Case, policy: str, fleet: Fleet, requests: int, seeds: Sequence[int]) -> Row:
    """One row: the mean over the seeds, and the standard error of the deadlines met."""
    make = contenders(case)[policy]
    rows = [
        simulate(case.workload.arrivals(requests, seed), make(), case.model, fleet, seed).row()
        for seed in seeds
    ]
    row: Row = {
        "workload": case.name,
        "rate": case.workload.rate,
        "scale": case.workload.scale,
        "policy": policy,
    }
    row |= {name: statistics.fmean(r[name] for r in rows) for name in rows[0]}
    met = [r["deadlines met %"] for r in rows]
    row["± %"] = statistics.stdev(met) / len(met) ** 0.5 if len(met) > 1 else 0.0
    return row


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    names = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in rows:
        cells = (_cell(name, row.get(name, "")) for name in names)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(name: str, value: object) -> str:
    if name in ("rate", "scale") or not isinstance(value, float):
        return str(value)
    return f"{value:.1f}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Deadlines met over the rate: a row of panels for each workload, one for each scale."""
    from matplotlib.figure import Figure

    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    scales = sorted({row["scale"] for row in rows})
    figure = Figure(figsize=(4 * len(scales), 3 * len(workloads)), layout="constrained")
    panels = figure.subplots(len(workloads), len(scales), squeeze=False, sharex=True, sharey=True)
    for across, workload in zip(panels, workloads, strict=True):
        for panel, scale in zip(across, scales, strict=True):
            lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for row in rows:
                if (row["workload"], row["scale"]) == (workload, scale):
                    lines[row["policy"]].append((row["rate"], row["deadlines met %"]))
            for name, points in lines.items():
                ours = name == "elastic"
                x, y = zip(*sorted(points), strict=True)
                panel.plot(
                    x, y, label=name, marker="o", ms=3, lw=2.5 if ours else 1.0, zorder=3 if ours else 2
                )
            panel.set(title=f"{workload}, deadlines × {scale:g}", xlabel="requests/s", ylim=(0, 100))
            panel.grid(alpha=0.3)
        across[0].set_ylabel("deadlines met, %")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for and print the table."""
    options = _parser().parse_args(arguments)
    profile = (
        Profile.load(options.profile) if options.profile else trial_profile(options.regroup_s, options.sync)
    )
    model = LatencyModel(profile)
    sizes = tuple(options.gang_sizes)
    fleet = Fleet(options.hosts, options.workers, sizes, options.routers, refuse=options.refuse)
    if options.trace:
        case = Case(str(options.trace), Workload((), 0.0), model, sizes)
        rows = []
        for name, make in contenders(case).items():
            if not options.policies or name in options.policies:
                report = simulate(read_trace(options.trace), make(), model, fleet, options.seed)
                rows.append({"policy": name, **report.row()})
    else:
        kinds = kinds_of(profile) if options.profile else None
        rows = [
            measure(case, name, fleet, options.requests, range(options.seed, options.seed + options.seeds))
            for workload in options.workloads
            for rate in options.rates
            for scale in options.scales
            for case in [_case(workload, rate, scale, kinds, model, sizes)]
            for name in options.policies or contenders(case)
        ]
    print(table(rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        meta = {"command": "python -m distriray.routing.simulate " + " ".join(arguments or sys.argv[1:])}
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
) -> Case:
    own, burst = WORKLOADS[name]
    if kinds is not None:  # the profile's sizes; a skewed mix has as many of the n-th as n says
        own = tuple(replace(k, share=n if name == "skewed" else 1.0) for n, k in enumerate(kinds, 1))
    return Case(name, Workload(own, rate, scale, burst), model, sizes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m distriray.routing.simulate", description=__doc__)
    add = parser.add_argument
    add("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    add("--rates", nargs="+", type=float, default=[0.3, 0.6, 0.9], help="requests a second")
    add("--scales", nargs="+", type=float, default=[1.0, 1.2, 1.5], help="of the base deadlines")
    add("--policies", nargs="+", help="names as in the table; all by default")
    add("--requests", type=int, default=1000, help="of each run")
    add("--seed", type=int, default=1)
    add("--seeds", type=int, default=3, help="runs of each case, with seeds from --seed on")
    add("--hosts", type=int, default=1)
    add("--workers", type=int, default=8, help="of each host")
    add("--gang-sizes", nargs="+", type=int, default=[1, 2, 4, 8])
    add("--routers", type=int, default=1)
    add("--refuse", action="store_true", help="refuse what no host can finish in time")
    add("--profile", type=Path, help="measured times; without it, assumed ones")
    add("--regroup-s", type=float, default=0.02, help="of the assumed times")
    add("--sync", type=float, default=1.5, help="a synchronous step over a displaced one, assumed")
    add("--trace", type=Path, help="JSON lines of requests, in place of workloads")
    add("--json", type=Path, help="write the rows here")
    add("--plot", type=Path, help="write deadlines met over the rate here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
