"""The figure of docs/gpu.md, from the measurements: `python -m bench.gpu.figure`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER, IMAGE = Path("docs/measurements/gpu"), Path("docs/images/gpu-steps.png")
GANGS = ("1", "2", "4", "8")
SERIES = {
    "first run, kernel by kernel": ("#c44e52", "shares-before", "kernel"),
    "kernel by kernel": ("#dd8452", "shares", "kernel"),
    "as graphs": ("#4c72b0", "shares", "graph"),
}
"""Colour, measurement and way of launching."""


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    for axis, size in zip(axes, ("1024x1024", "2048x2048", "3840x3840"), strict=True):
        draw(axis, size)
    axes[0].set_ylabel("milliseconds a step")
    axes[2].legend(frameon=False, fontsize=8, bbox_to_anchor=(1.0, 0.95))
    figure.suptitle("One rank's share of a guided SDXL step on one H100, its peers absent", fontsize=11)
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGE, dpi=110)
    print(IMAGE)


def draw(axis: Any, size: str) -> None:
    """One size: a group of bars for each gang, and a line for diffusers."""
    for place, (label, (color, name, launched)) in enumerate(SERIES.items()):
        found = shares(name, size, launched)
        heights = [found.get(gang, 0.0) for gang in GANGS]
        axis.bar([x + 0.27 * (place - 1) for x in range(len(GANGS))], heights, 0.25, color=color, label=label)
    alone = shares("shares", size, "kernel", "diffusers")["diffusers"]
    axis.axhline(alone, color="black", linewidth=0.8, linestyle="--")
    axis.text(-0.4, alone, "diffusers", ha="left", va="bottom", fontsize=8)
    axis.set_xticks(range(len(GANGS)), [f"of {gang}" for gang in GANGS])
    axis.set_title(size.replace("x", " × "), fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def shares(name: str, size: str, launched: str, of: str = "a gang of ") -> dict[str, float]:
    """Milliseconds of a step by gang; guidance is split where the gang is even.

    What the measurement of that name has is taken from it, and the rest from those that complete it.
    """
    found: dict[str, float] = {}
    for path in sorted(FOLDER.glob(f"{name}*.json"), key=lambda path: (path.stem != name, path)):
        if name == "shares" and "before" in path.stem:
            continue
        for row in json.loads(path.read_text())["rows"]:
            gang = row["share of"].removeprefix("a gang of ")
            wanted = row["size"] == size and row["share of"].startswith(of)
            split = row["guidance"] == ("together" if gang in ("1", "diffusers") else "split")
            if wanted and split and row.get("launched by", "kernel") == launched:
                found.setdefault(gang, float(row["step, ms"]))
    return found


if __name__ == "__main__":
    main()
