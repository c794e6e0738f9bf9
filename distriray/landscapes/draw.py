"""Draws a `Scene` at any size: soft edges, haze, light from the sun's side, and a lake that mirrors it all.

Lengths are in units of the shorter side, so a scene looks alike at every size; colours are RGB in [0, 1].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from distriray.landscapes.scene import Scene
from distriray.landscapes.trees import Field, draw_trees, rgb

SKY = {
    "day": ((0.25, 0.50, 0.82), (0.50, 0.72, 0.92), (0.80, 0.90, 0.96)),
    "dawn": ((0.45, 0.47, 0.75), (0.85, 0.62, 0.76), (1.00, 0.84, 0.76)),
    "sunset": ((0.27, 0.18, 0.42), (0.84, 0.34, 0.29), (1.00, 0.72, 0.32)),
    "night": ((0.02, 0.04, 0.13), (0.05, 0.09, 0.23), (0.14, 0.20, 0.37)),
}
LIGHT = {
    "day": (1, 1, 1),
    "dawn": (0.92, 0.78, 0.86),
    "sunset": (0.88, 0.58, 0.46),
    "night": (0.31, 0.35, 0.52),
}
BODY = {
    "day": (1, 0.97, 0.78),
    "dawn": (1, 0.90, 0.72),
    "sunset": (1, 0.88, 0.50),
    "night": (0.93, 0.94, 0.90),
}
GLOW = {"day": 0.35, "dawn": 0.4, "sunset": 0.5, "night": 0.22}
SOIL = {"summer": (0.36, 0.60, 0.22), "autumn": (0.72, 0.52, 0.22), "winter": (0.90, 0.93, 0.97)}
SAND = (0.94, 0.70, 0.38)
ROCK = {"hills": (0.30, 0.45, 0.28), "rocky": (0.45, 0.39, 0.38), "snowy": (0.42, 0.44, 0.52)}
SIDE = {"left": 0.2, "centre": 0.5, "right": 0.8}


def noise(rng: np.random.Generator, y: Field, x: Field, cell: float, stretch: float = 1.0) -> Field:
    """Smooth noise in about [-1, 1], (len(y), len(x)); a cell is `cell` high and `cell * stretch` wide."""
    grid = rng.standard_normal((64, 64)).astype(np.float32)

    def weights(positions: Field) -> Field:
        distance = np.abs(np.mod(positions, 60)[:, None] + 2 - np.arange(64, dtype=np.float32))
        near, far = 2 / 3 - distance**2 + distance**3 / 2, np.clip(2 - distance, 0, None) ** 3 / 6
        return np.where(distance < 1, near, far)  # the cubic B-spline

    return (weights(y / cell) @ grid @ weights(x / (cell * stretch)).T) * 1.4


def mix(below: Field, above: Field | tuple[float, ...], alpha: Field) -> Field:
    """`above` laid over `below`, (H, W, 3), where alpha, (H, W) or (H, 1), is 1."""
    return below + alpha[..., None] * (np.asarray(above, np.float32) - below)


def draw(scene: Scene, height: int = 256, width: int = 256) -> NDArray[np.uint8]:
    """The picture of a scene, (height, width, 3) uint8 RGB; any size, best from 128 upwards."""
    rng = np.random.default_rng([scene.seed, 2])
    short = min(height, width)
    y = ((np.arange(height) + 0.5) / short).astype(np.float32)
    x = ((np.arange(width) + 0.5) / short).astype(np.float32)
    top, wide, pixel = height / short, width / short, 1.0 / short
    horizon = (0.55 + 0.04 * rng.uniform(-1, 1)) * top
    light = np.asarray(LIGHT[scene.time], np.float32)

    ranges = _ridges(scene, rng, x, horizon)
    skyline = np.min([ridge for ridge, _ in ranges], axis=0) if ranges else np.full_like(x, horizon)
    sun_x = (SIDE[scene.side or "centre"] + rng.uniform(-0.06, 0.06)) * wide
    rest = skyline[np.argmin(np.abs(x - sun_x))]
    sun_y = (
        0.12 * top + 0.02 * rng.uniform(-1, 1) if scene.height == "high" else rest - rng.uniform(0.0, 0.05)
    )

    picture = _sky(scene, rng, y, x, horizon, (sun_x, sun_y))
    haze = picture[min(int(horizon * short), height - 1)].mean(axis=0)
    for ridge, peaks in ranges:
        picture = _mountains(scene, rng, picture, y, x, ridge, peaks, sun_x, haze, horizon, pixel)
    picture = _ground(scene, rng, picture, y, x, horizon, (sun_x, sun_y), light, pixel)
    if scene.trees != "none":
        picture = draw_trees(scene, rng, picture, y, x, horizon, light, sun_x, pixel)
    picture = picture + 0.004 * noise(rng, y, x, 0.02)[..., None]
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


def _sky(
    scene: Scene, rng: np.random.Generator, y: Field, x: Field, horizon: float, sun: tuple[float, float]
) -> Field:
    high, middle, low = (np.asarray(c, np.float32) + 0.02 * rng.standard_normal(3) for c in SKY[scene.time])
    fall = np.clip(y / horizon, 0, 1)[:, None]
    column = np.where(
        fall < 0.6, high + (middle - high) * fall / 0.6, middle + (low - middle) * (fall - 0.6) / 0.4
    )
    picture = np.broadcast_to(column[:, None, :], (len(y), len(x), 3)).astype(np.float32)
    if scene.stars == "present":
        count = int(70 * x[-1])
        places = rng.uniform(0, 1, (count, 2)) * (horizon * 0.95, x[-1])
        shine = np.zeros(picture.shape[:2], np.float32)
        for (row, column_), size in zip(places, rng.uniform(0.0035, 0.006, count), strict=True):
            rows, columns = (_window(axis, at, 0.02) for axis, at in ((y, row), (x, column_)))
            away = (y[rows, None] - row) ** 2 + (x[None, columns] - column_) ** 2
            shine[rows, columns] += np.exp(-away / (2 * size**2))
        picture = mix(picture, (0.95, 0.95, 1.0), np.clip(shine, 0, 1) * 0.9)
    if scene.body == "present":
        away = np.hypot(y[:, None] - sun[1], x[None] - sun[0])
        radius = 0.055 if scene.time == "night" else 0.062
        colour = np.asarray(BODY[scene.time], np.float32)
        picture = mix(picture, colour, GLOW[scene.time] * np.exp(-((away / 0.2) ** 2)))
        picture = mix(picture, colour, _edge(radius - away, 0.006))
        if scene.time == "night":
            sea = _edge(0.3 * radius - np.hypot(y[:, None] - sun[1] + 0.01, x[None] - sun[0] - 0.015), 0.012)
            picture = mix(picture, (0.74, 0.76, 0.78), sea * 0.8)
    if scene.clouds == "cloudy":
        puffs = noise(rng, y, x, 0.055, 2.2) + 0.5 * noise(rng, y, x, 0.025, 2.0)
        band = np.exp(-(((y - rng.uniform(0.35, 0.55) * horizon) / (0.30 * horizon)) ** 2))[:, None]
        cover = np.clip((puffs + 0.25) * 1.5, 0, 1) * band
        lit = low * 0.35 + 0.65 * np.asarray(LIGHT[scene.time], np.float32) * (0.98, 0.98, 1.0)
        picture = mix(picture, lit + 0.10 * (scene.time == "sunset"), np.clip(cover, 0, 1) * 0.85)
    return picture


def _ridges(scene: Scene, rng: np.random.Generator, x: Field, horizon: float) -> list[tuple[Field, Field]]:
    """Far range first: each ridge's height line over x, and the index of the peak that each x belongs to."""
    if scene.mountains == "none":
        return []
    ranges = []
    for far in (1.0, 0.0):
        if scene.mountains == "hills":
            wave = noise(rng, np.zeros(1, np.float32), x, 0.22 + 0.05 * far)[0]
            ranges.append((horizon - (0.06 + 0.05 * far) - 0.045 * wave - 0.01, x))
            continue
        step = 0.26 + 0.06 * far
        centres = (np.arange(20) + rng.uniform(-0.3, 0.3, 20) - rng.uniform(0, 1)) * step
        heights = rng.uniform(0.11, 0.17, 20) + 0.075 * far
        slopes = rng.uniform(0.75, 1.1, 20)
        rise = heights[:, None] - slopes[:, None] * np.abs(x[None] - centres[:, None])
        rough = 0.008 * noise(rng, np.zeros(1, np.float32), x, 0.018)[0]
        owner = centres[np.argmax(rise, axis=0)].astype(np.float32)
        ranges.append((horizon - np.maximum(rise.max(axis=0), 0.02) + rough, owner))
    return [(ridge.astype(np.float32), owner) for ridge, owner in ranges]


def _mountains(
    scene: Scene,
    rng: np.random.Generator,
    picture: Field,
    y: Field,
    x: Field,
    ridge: Field,
    owner: Field,
    sun_x: float,
    haze: Field,
    horizon: float,
    pixel: float,
) -> Field:
    base = np.asarray(ROCK[scene.mountains], np.float32)
    if scene.mountains == "hills" and scene.season:
        base = {
            "summer": base,
            "autumn": rgb((0.52, 0.40, 0.22)),
            "winter": rgb((0.74, 0.79, 0.86)),
        }[scene.season]
    depth = y[:, None] - ridge[None]
    texture = noise(rng, y, x, 0.03, 1.0)
    if scene.mountains == "hills":
        shade = 1.0 - 0.9 * np.clip(depth, 0, 0.15) + 0.03 * texture
        colour = base * shade[..., None]
    else:
        crooked = owner[None] + 0.35 * (depth * texture) + 0.06 * np.sin(40 * depth)
        lit = _edge((np.sign(sun_x - owner[None]) * (x[None] - crooked)), 0.014)
        shade = 0.62 + 0.42 * lit + 0.06 * texture
        colour = base * shade[..., None]
        if scene.mountains == "snowy":
            line = 0.115 + 0.025 * noise(rng, np.zeros(1, np.float32), x, 0.02) + 0.012 * texture
            tall = np.clip((horizon - ridge - 0.06) / 0.12, 0, 1.1)[None]
            snow = _edge(line * tall - depth, 0.006)
            white = rgb((0.97, 0.98, 1.0)) * (0.80 + 0.28 * lit)[..., None]
            white = white / rgb(LIGHT[scene.time]) ** 0.5  # snow keeps more of its own white than rock
            colour = mix(colour, white, snow)
    colour = colour * np.asarray(LIGHT[scene.time], np.float32)
    distance = np.clip((horizon - ridge.mean()) / 0.3, 0.12, 0.5) * 0.7
    foot = np.clip(1 - (horizon - y) / 0.22, 0, 1)[:, None] ** 2 * 0.4
    colour = mix(colour.astype(np.float32), haze, np.clip(distance + foot, 0, 0.75) * np.ones_like(depth))
    return mix(picture, colour, _edge(depth, 1.2 * pixel))


def _ground(
    scene: Scene,
    rng: np.random.Generator,
    picture: Field,
    y: Field,
    x: Field,
    horizon: float,
    sun: tuple[float, float],
    light: Field,
    pixel: float,
) -> Field:
    below = np.clip(y - horizon, 0, None)
    near = np.clip(below / (y[-1] - horizon), 0, 1)
    if scene.ground == "lake":
        ripple = noise(rng, y, x, 0.012, 6.0) * (0.003 + 0.012 * near[:, None])
        source = horizon - below[:, None] + ripple
        rows = np.clip((source / (y[1] - y[0]) - 0.5), 0, len(y) - 1.001)
        row, part = rows.astype(np.intp), rows - rows.astype(np.intp)
        columns = np.arange(len(x))[None]
        mirror = picture[row, columns] * (1 - part[..., None]) + picture[row + 1, columns] * part[..., None]
        mirror = mirror * (0.86 - 0.14 * near[:, None, None]) + rgb((0.01, 0.03, 0.06)) * light
        if scene.body == "present":
            path = np.exp(-(((x[None] - sun[0]) / (0.03 + 0.05 * near[:, None])) ** 2))
            glitter = np.clip(0.35 + 0.5 * noise(rng, y, x, 0.012, 4.0), 0, 1) * path
            mirror = mix(mirror, BODY[scene.time], 0.55 * glitter)
        picture = mix(picture, mirror, _edge(y[:, None] - horizon + 0 * x[None], 1.2 * pixel))
        bank = y[-1] * 0.9 + 0.02 * noise(rng, np.zeros(1, np.float32), x, 0.25)[0]
        shore = _soil(scene, rng, y, x, near, light)
        return mix(picture, shore, _edge(y[:, None] - bank[None], 2 * pixel))
    return mix(
        picture, _soil(scene, rng, y, x, near, light), _edge(y[:, None] - horizon + 0 * x[None], 1.2 * pixel)
    )


def _soil(scene: Scene, rng: np.random.Generator, y: Field, x: Field, near: Field, light: Field) -> Field:
    if scene.ground == "desert":
        dunes = np.sin(6 * noise(rng, y, x, 0.16, 3.0) + 30 * near[:, None] ** 0.7)
        colour = rgb(SAND) * (0.93 + 0.09 * dunes)[..., None]
    else:
        rolling, grain = noise(rng, y, x, 0.09, 3.0), noise(rng, y, x, 0.02, 1.8)
        strength = 0.4 if scene.season == "winter" else 1.0
        colour = (
            rgb(SOIL[scene.season or "summer"]) * (1 + strength * (0.08 * rolling + 0.05 * grain))[..., None]
        )
    return colour * (1.06 - 0.3 * near)[:, None, None] * light


def _edge(signed_distance: Field, softness: float) -> Field:
    """0 outside, 1 inside, smooth over `softness` to either side of the edge."""
    ramp = np.clip(signed_distance / (2 * softness) + 0.5, 0, 1)
    return ramp * ramp * (3 - 2 * ramp)


def _window(axis: Field, centre: float, reach: float) -> slice:
    return slice(*np.searchsorted(axis, (centre - reach, centre + reach)))
