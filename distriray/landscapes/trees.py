"""Trees: pines of stacked skirts and broadleaf trees of round crowns, lit from the sun's side."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distriray.landscapes.scene import Scene

Field = NDArray[np.floating[Any]]

LEAVES = {
    ("pine", "summer"): (0.10, 0.34, 0.20),
    ("pine", "autumn"): (0.14, 0.32, 0.16),
    ("pine", "winter"): (0.30, 0.44, 0.42),
    ("broadleaf", "summer"): (0.20, 0.46, 0.12),
    ("broadleaf", "autumn"): (0.86, 0.38, 0.08),
    ("broadleaf", "winter"): (0.66, 0.70, 0.78),
}
TRUNK = (0.28, 0.19, 0.13)


def rgb(colour: tuple[float, ...]) -> Field:
    """A colour as (3,) float32."""
    return np.asarray(colour, np.float32)


def draw_trees(
    scene: Scene,
    rng: np.random.Generator,
    picture: Field,
    y: Field,
    x: Field,
    horizon: float,
    light: Field,
    sun_x: float,
    pixel: float,
) -> Field:
    """The picture, (H, W, 3) float in [0, 1], with the scene's trees drawn over it, the farthest first."""
    lowest, wide = float(y[-1]), float(x[-1])
    few, many = int(rng.integers(3, 5)), int(rng.integers(10, 14))
    count = {"one": 1, "few": few, "many": many}[scene.trees]
    count = round(count * wide) if scene.trees == "many" else count
    places = (np.arange(count) + 0.5 + rng.uniform(-0.32, 0.32, count)) / count
    if count == 1:
        places = rng.uniform(0.15, 0.85, 1)
    nearness = rng.uniform(0.25, 0.95, count) if scene.ground != "lake" else rng.uniform(0.84, 0.98, count)
    order = np.argsort(nearness)
    for place, near, jitter, tint in zip(
        places[order],
        nearness[order],
        rng.uniform(0.85, 1.15, count),
        rng.uniform(0.88, 1.12, count),
        strict=True,
    ):
        foot = horizon + (lowest - horizon) * near
        tall = (0.10 + 0.17 * near) * jitter * (1.3 if count == 1 else 0.8 if scene.trees == "many" else 1.0)
        _tree(scene, picture, y, x, place * wide, foot, tall, light * tint, sun_x, pixel)
    return picture


def _tree(
    scene: Scene,
    picture: Field,
    y: Field,
    x: Field,
    centre: float,
    foot: float,
    tall: float,
    light: Field,
    sun_x: float,
    pixel: float,
) -> None:
    rows = slice(*np.searchsorted(y, (foot - 1.15 * tall, foot + 0.06 * tall)))
    columns = slice(*np.searchsorted(x, (centre - 0.6 * tall, centre + 0.6 * tall)))
    across, up = (x[None, columns] - centre) / tall, (foot - y[rows, None]) / tall
    soft = 1.2 * pixel / tall
    patch = picture[rows, columns]

    def lay(colour: Field, inside: Field, softness: float = soft) -> None:
        nonlocal patch
        alpha = np.clip(inside / (2 * softness) + 0.5, 0, 1)[..., None]
        patch = patch + alpha * (colour - patch)

    leaf = rgb(LEAVES[scene.tree_kind or "pine", scene.season or "summer"])
    toward = np.sign(sun_x - centre)
    lay(patch * 0.72, 1 - np.hypot(across / 0.34, up / 0.05), 0.3)
    lay(rgb(TRUNK) * light, np.minimum(0.035 - np.abs(across), np.minimum(up, 0.5 - up)))
    if scene.tree_kind == "broadleaf":
        for middle, level, size in (
            (0.0, 0.66, 0.30),
            (-0.17, 0.52, 0.2),
            (0.17, 0.52, 0.2),
            (0.0, 0.84, 0.19),
        ):
            ball = size - np.hypot(across - middle, up - level)
            lit = np.clip(0.82 + 0.55 * toward * across + 0.45 * (up - 0.6), 0.5, 1.3)[..., None]
            lay(leaf * light * lit, ball, 1.5 * soft)
    else:
        for start, end, half in ((0.12, 0.58, 0.26), (0.34, 0.80, 0.20), (0.58, 1.05, 0.14)):
            skirt = half * (end - up) / (end - start) - np.abs(across)
            lit = np.clip(0.85 + 1.1 * toward * across + 0.5 * (up - start), 0.5, 1.35)[..., None]
            lay(leaf * light * lit, np.minimum(skirt, up - start))
            if scene.season == "winter":
                lay(rgb((0.95, 0.97, 1.0)) * light, np.minimum(skirt, up - end + 0.22) - 0.01, 0.03)
    picture[rows, columns] = patch
