"""Figure of what a mix costs and gives: `python -m bench.tradeoff QUALITY EXCHANGE OUT`.

    python -m bench.tradeoff mixes.json mixes-768.json mixes.png

One mark for each mix and backend: how many times as fast as one rank (`bench.exchange`), and how near its
pictures are to one device's (`bench.quality --rows mixes`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.arguments import measurement
from distriray.arguments import positive
from distriray.config import MIXES

PAPER = "paper"
COLOURS = ("tab:blue", "tab:orange", "tab:green")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("quality", type=measurement, help="the JSON of bench.quality --rows mixes")
    parser.add_argument("exchange", type=measurement, help="the JSON of bench.exchange")
    parser.add_argument("out", type=Path, help="the picture")
    parser.add_argument("--patches", type=positive, default=4, help="of the pictures (default 4)")
    given = parser.parse_args(arguments)
    psnr, speeds = psnr_of(given.quality, given.patches), speeds_of(given.exchange)
    if not psnr:
        parser.error(f"the quality has no mixes of {given.patches} patches; measure them with --rows mixes")
    if not speeds:
        parser.error("the exchange has no step of a mix; it was not written by bench.exchange")
    plot(psnr, speeds, given.exchange, given.patches, given.out)


def psnr_of(quality: dict[str, Any], patches: int) -> dict[str, float]:
    """PSNR in dB by mix, of so many patches."""
    found = {}
    for row in quality["rows"]:
        if row.get("question") == "mixes" and row["patches"] == str(patches):
            name = row["method"].split(", ")[0]
            found[name if name in MIXES else PAPER] = float(row["PSNR, dB"].split()[0])
    return found


def speeds_of(exchange: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many times as fast as one rank, by backend and mix."""
    speeds: dict[str, dict[str, float]] = {}
    for row in exchange["rows"]:
        if row.get("mode") in (PAPER, *MIXES):
            speed = float(row["faster than one rank"].removesuffix("x"))
            speeds.setdefault(row["backend"], {})[row["mode"]] = speed
    return speeds


def plot(
    psnr: dict[str, float],
    speeds: dict[str, dict[str, float]],
    exchange: dict[str, Any],
    patches: int,
    out: Path,
) -> None:
    """Draw the marks; what is exact lies on a line of its own above all that can be measured."""
    from matplotlib.figure import Figure

    side, ranks = exchange["settings"]["size"], exchange["settings"]["ranks"]
    exact = max(psnr.values()) + 8
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel=f"a step of {ranks} ranks at {side}x{side}, times as fast as one rank",
        ylabel=f"PSNR of {patches} patches against one device, dB",
        title="What a mix costs, and what it gives",
    )
    axes.axhline(exact, color="0.8", zorder=0)
    axes.annotate("one device's numbers", (0.4, exact - 2.5), xycoords=("axes fraction", "data"), color="0.4")
    for (backend, found), colour in zip(speeds.items(), COLOURS, strict=False):
        for name, speed in found.items():
            at = (speed, psnr.get(name, exact))
            axes.plot(*at, marker="*" if name == PAPER else "o", color=colour, markersize=9)
        axes.plot([], [], "o", color=colour, label=backend)
    for name in sorted(set().union(*speeds.values()) - {PAPER}):  # at one height for all backends
        at = max(found[name] for found in speeds.values() if name in found), psnr.get(name, exact)
        axes.annotate(name, at, xytext=(8, 4), textcoords="offset points", color="0.3", fontsize=8)
    axes.plot([], [], "*", color="0.4", markersize=9, label="the paper's")
    axes.set_ylim(top=exact + 4)
    axes.margins(x=0.15)
    axes.legend(loc="lower left")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main()
