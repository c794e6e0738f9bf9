"""Scenes: a `Scene` is a choice for each attribute plus a seed for the details."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "time": ("day", "dawn", "sunset", "night"),
    "body": ("none", "present"),
    "side": ("left", "centre", "right"),
    "height": ("low", "high"),
    "mountains": ("none", "hills", "rocky", "snowy"),
    "ground": ("meadow", "desert", "lake"),
    "season": ("summer", "autumn", "winter"),
    "trees": ("none", "one", "few", "many"),
    "tree_kind": ("pine", "broadleaf"),
    "clouds": ("clear", "cloudy"),
    "stars": ("none", "present"),
}
"""Every attribute and its values. The body is the moon at night and the sun otherwise."""

HELD_OUT_SEED = 1_000_000_000
"""Scenes for training have seeds below this one, scenes for validation start here."""


@dataclass(frozen=True)
class Scene:
    """A landscape. An attribute that another one makes meaningless is None (the side of an absent sun)."""

    seed: int
    time: str
    body: str
    side: str | None
    height: str | None
    mountains: str
    ground: str
    season: str | None
    trees: str
    tree_kind: str | None
    clouds: str
    stars: str | None

    def labels(self) -> list[int]:
        """The index of each attribute's value in the order of `ATTRIBUTES`; -1 where it is None."""
        return [
            -1 if getattr(self, name) is None else values.index(getattr(self, name))
            for name, values in ATTRIBUTES.items()
        ]


def sample_scene(seed: int) -> Scene:
    """The scene of a seed. Equal seeds give equal scenes and, through `draw`, equal pictures."""
    rng = np.random.default_rng([seed, 1])

    def pick(name: str, *weights: float) -> str:
        return str(rng.choice(ATTRIBUTES[name], p=weights or None))

    time, body, side, height = pick("time"), pick("body", 0.15, 0.85), pick("side"), pick("height")
    mountains, ground = pick("mountains", 0.13, 0.27, 0.3, 0.3), pick("ground", 0.4, 0.2, 0.4)
    season, trees, kind = pick("season"), pick("trees", 0.25, 0.2, 0.25, 0.3), pick("tree_kind")
    clouds, stars = pick("clouds", 0.6, 0.4), pick("stars", 0.35, 0.65)
    if ground == "desert" and trees == "many":
        trees = "none"
    return Scene(
        seed=seed,
        time=time,
        body=body,
        side=side if body == "present" else None,
        height=height if body == "present" else None,
        mountains=mountains,
        ground=ground,
        season=season if ground != "desert" else None,
        trees=trees,
        tree_kind=kind if trees != "none" else None,
        clouds=clouds,
        stars=stars if time == "night" else None,
    )
