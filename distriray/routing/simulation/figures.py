"""A comparison as a table and as a plot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from distriray.routing.simulation.comparison import Row

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
