"""Policies side by side on one workload."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from distriray.routing.latency import LatencyModel
from distriray.routing.policies import POLICIES
from distriray.routing.policies.baselines import FixedSize, Leases, SizePerShape
from distriray.routing.policy import HostPolicy
from distriray.routing.simulation.fleet import SimulatedFleet
from distriray.routing.simulation.simulator import simulate
from distriray.routing.simulation.workload import Kind, Workload

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class LoadCase:
    """One workload at one load, before the choice of a policy."""

    name: str
    workload: Workload
    model: LatencyModel
    gang_sizes: tuple[int, ...]


def contenders(case: LoadCase) -> dict[str, Callable[[], HostPolicy]]:
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


def _smallest_in_time(case: LoadCase, kind: Kind) -> int:
    """The smallest gang that meets a kind's deadline without waiting, or else the fastest."""
    workload = case.workload
    seconds = {
        g: case.model.times(g, kind.height, kind.width, 1).run_s(0, workload.steps) for g in case.gang_sizes
    }
    limit = workload.scale * (kind.deadline_s or 0.0)
    return next((g for g in case.gang_sizes if seconds[g] <= limit), min(seconds, key=seconds.__getitem__))


def measure(case: LoadCase, policy: str, fleet: SimulatedFleet, requests: int, seeds: Sequence[int]) -> Row:
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
