"""`python -m bench.routing`: how long a decision takes, and how far policies are from the best possible."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from bench.arguments import add_json
from bench.report import Report
from bench.routing_optimum import most_deadlines
from distriray.arguments import at_least, positive
from distriray.routing.latency import LatencyModel
from distriray.routing.policies.baselines import Leases
from distriray.routing.policies.elastic import Elastic
from distriray.routing.policy import HostPolicy, HostView, RequestView
from distriray.routing.simulation.fleet import SimulatedFleet
from distriray.routing.simulation.simulator import simulate
from distriray.routing.simulation.workload import TRIAL_KINDS, Arrival, Workload, trial_profile

MODEL = LatencyModel(trial_profile())
FLEET = SimulatedFleet()


def crowd(count: int, draw: random.Random, urgent: float) -> HostView:
    """A host of 8 with `count` requests; a share of `urgent` has a deadline that can still be met."""
    requests = []
    for i in range(count):
        kind = draw.choice(TRIAL_KINDS)
        soon = draw.random() < urgent
        slack = draw.uniform(2.0, 60.0) if soon else draw.choice([None, -draw.uniform(0.0, 50.0)])
        requests.append(
            RequestView(
                id=str(i),
                height=kind.height,
                width=kind.width,
                batch=1,
                steps_total=50,
                steps_done=draw.randrange(40) if draw.random() < 0.1 else 0,
                arrival_s=100.0 - draw.uniform(0.0, 90.0),
                deadline_s=None if slack is None else 100.0 + slack,
                priority=draw.randrange(3),
            )
        )
    view = HostView(100.0, tuple(range(FLEET.workers)), FLEET.gang_sizes, tuple(requests))
    running = Elastic().plan(view, MODEL).assignments
    return replace(view, requests=tuple(replace(r, workers=running.get(r.id)) for r in view.requests))


def decision_times(count: int, decisions: int, seed: int) -> dict[str, float]:
    """Milliseconds of a decision with `count` requests on a host of 8, in this thread's processor time."""
    draw = random.Random(seed)
    times = []
    for _ in range(decisions):
        view = crowd(count, draw, draw.choice([0.0, 0.02, 0.3, 1.0]))
        started = time.thread_time()
        Elastic().plan(view, MODEL)
        times.append(1e3 * (time.thread_time() - started))
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return {"requests": count, "p50 ms": cuts[49], "p99 ms": cuts[98], "max ms": max(times)}


def against_optimum(requests: int, cases: int, seed: int) -> dict[str, float]:
    """Deadlines met by policies that see requests come, and by one that knows them all beforehand."""
    draw = random.Random(seed)
    totals = {"optimum": 0, "elastic": 0, "leases": 0}
    proven = 0
    for _ in range(cases):
        spread = draw.choice([0.0, 2.0, 6.0])
        arrivals = [
            Arrival(
                at_s=round(at, 2),
                height=kind.height,
                width=kind.width,
                deadline_s=(kind.deadline_s or 0.0) * draw.choice([1.0, 1.2, 1.5]),
            )
            for at in sorted(draw.uniform(0.0, spread) for _ in range(requests))
            for kind in [draw.choice(TRIAL_KINDS)]
        ]
        best, certain = most_deadlines(arrivals, MODEL, FLEET)
        totals["optimum"] += best
        proven += certain
        policies: dict[str, HostPolicy] = {"elastic": Elastic(), "leases": Leases()}
        for name, policy in policies.items():
            totals[name] += simulate(arrivals, policy, MODEL, FLEET).met
    share = {name: 100.0 * met / (cases * requests) for name, met in totals.items()}
    return {"requests": requests, "cases": cases, "proven": proven, **share}


def burst_bound(scale: float, bursts: int, seed: int) -> dict[str, float]:
    """The share of deadlines that any schedule could meet when 20 requests come to an idle host at once."""
    met = proven = 0
    for i in range(bursts):
        workload = Workload(TRIAL_KINDS, 1.0, scale, burst=20)
        best, certain = most_deadlines(list(workload.arrivals(20, seed + i)), MODEL, FLEET, limit_s=10.0)
        met += best
        proven += certain
    return {"scale": scale, "bursts of 20": bursts, "proven": proven, "optimum": 5.0 * met / bursts}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, and write them with --json."""
    parser = argparse.ArgumentParser(prog="python -m bench.routing", description=__doc__)
    parser.add_argument("--decisions", type=at_least(2), default=400)
    parser.add_argument("--cases", type=positive, default=20, help="for each number of requests")
    parser.add_argument("--seed", type=int, default=1)
    add_json(parser)
    options = parser.parse_args(arguments)
    times = [decision_times(count, options.decisions, options.seed) for count in (10, 100, 1000)]
    show(times)
    optimum = [against_optimum(count, options.cases, options.seed) for count in (4, 6, 8)]
    show(optimum)
    bursts = [burst_bound(scale, options.cases, options.seed) for scale in (1.0, 1.2, 1.5)]
    show(bursts)
    if options.json:
        command = "python -m bench.routing " + " ".join(arguments or sys.argv[1:])
        options.json.parent.mkdir(parents=True, exist_ok=True)
        context = Report("", (), seed=options.seed, settings=vars(options)).context
        found = {"command": command, **context, "decision": times, "optimum": optimum, "bursts": bursts}
        options.json.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
    return 0


def show(rows: Sequence[dict[str, float]]) -> None:
    """Rows as a Markdown table."""
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(f'{value:.4g}' for value in row.values())} |", flush=True)
    print()


if __name__ == "__main__":
    sys.exit(main())
