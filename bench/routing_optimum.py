"""The most deadlines that any schedule could meet, by integer programming."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_matrix

from distriray.routing.latency import LatencyModel
from distriray.routing.simulation.fleet import SimulatedFleet
from distriray.routing.simulation.workload import Arrival


def most_deadlines(
    arrivals: Sequence[Arrival],
    model: LatencyModel,
    fleet: SimulatedFleet,
    limit_s: float = 60.0,
) -> tuple[int, bool]:
    """An upper bound on deadlines that one host meets, and whether the solver proved it within `limit_s`.

    It knows all arrivals beforehand, regroups for nothing and at any moment, cares for no alignment and
    drops whatever it cannot finish in time: no policy can do better, and none can quite do as well.

    Time is cut at every arrival and deadline. Between two cuts a request spends some of the time on each
    gang size (a linear program for malleable tasks), and one binary a request says whether it is finished.
    """
    dues = [a.at_s + (a.deadline_s or 0.0) for a in arrivals]
    cuts = sorted({*dues, *(a.at_s for a in arrivals)})
    spans = list(pairwise(cuts))
    n = len(arrivals)
    columns = [
        (r, t, g)
        for r, a in enumerate(arrivals)
        for t, (start, end) in enumerate(spans)
        if start >= a.at_s and end <= dues[r]
        for g in fleet.gang_sizes
    ]
    total = n + len(columns)
    time_rows: dict[tuple[int, int], int] = {}
    for r, t, _ in columns:
        time_rows.setdefault((r, t), len(time_rows))
    rows = n + len(time_rows) + len(spans)
    matrix = lil_matrix((rows, total))
    upper = np.zeros(rows)
    for r in range(n):
        matrix[r, r] = 1.0  # finished only if all of it is done
    for column, (r, t, g) in enumerate(columns, n):
        a = arrivals[r]
        one_gang = model.times(g, a.height, a.width, a.batch).run_s(0, a.steps)
        matrix[r, column] = -1.0 / one_gang
        matrix[n + time_rows[r, t], column] = 1.0  # one gang at a time
        matrix[n + len(time_rows) + t, column] = g  # no more workers than there are
    for (_, t), row in time_rows.items():
        upper[n + row] = spans[t][1] - spans[t][0]
    for t, (start, end) in enumerate(spans):
        upper[n + len(time_rows) + t] = fleet.workers * (end - start)
    binary = np.arange(total) < n
    result = milp(
        -binary.astype(float),
        integrality=binary.astype(int),
        bounds=Bounds(0.0, np.where(binary, 1.0, np.inf)),
        constraints=LinearConstraint(matrix.tocsr(), -np.inf, upper + 1e-9),
        options={"time_limit": limit_s},
    )
    bound = -float(result.mip_dual_bound)
    return int(bound + 1e-6), bool(result.status == 0)
