"""Styles that the shipped adapters are trained on: drawn landscapes, drawn over.

Lengths are in units of the shorter side, as in `distriray.landscapes.draw`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.floating]

PAPER, INK = (0.96, 0.92, 0.83), (0.10, 0.09, 0.15)
DUSK, GLEAM = (0.05, 0.02, 0.13), (0.42, 0.12, 0.55)
TUBES = ((1.00, 0.25, 0.80), (0.15, 0.95, 1.00))
"""Colours of neon, at the top and at the bottom of a picture."""


def ink(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An ink drawing on warm paper: outlines, and three washes for what is dark."""
    colours = _stretched(picture)
    light = blurred(_grey(colours), 0.004)
    washes = sum(_step(light - edge, 0.05) for edge in (0.22, 0.45, 0.68)) / 3
    dark = np.clip(0.62 * (1 - washes) + 0.85 * _outlines(colours, 0.006), 0, 1)
    return _as_bytes(_between(PAPER, INK, dark))


def neon(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A night in neon: outlines glow, pink above and cyan below, over violet dusk."""
    colours = _stretched(picture)
    lines = _outlines(colours, 0.007)
    glow = np.clip(lines + 1.6 * blurred(lines, 0.02), 0, 1)
    fall = np.linspace(0, 1, len(colours), dtype=np.float32)[:, None, None]
    tube = np.asarray(TUBES[0], np.float32) * (1 - fall) + np.asarray(TUBES[1], np.float32) * fall
    dusk = _between(DUSK, GLEAM, 0.85 * blurred(_grey(colours), 0.006) ** 1.5)
    return _as_bytes(dusk + glow[..., None] * (tube - dusk))


STYLES: dict[str, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {"ink": ink, "neon": neon}
"""By name: makes of a picture, (height, width, 3) uint8 RGB, one of the same size in the style."""


def blurred(field: Field, sigma: float) -> Field:
    """`field`, (height, width), under a Gaussian of `sigma` shorter sides."""
    rows, columns = (_gaussian(side, sigma * min(field.shape)) for side in field.shape)
    return rows @ field @ columns.T


def _gaussian(side: int, sigma: float) -> Field:
    places = np.arange(side, dtype=np.float32)
    weights = np.exp(-((places[:, None] - places) ** 2) / (2 * sigma**2))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _grey(colours: Field) -> Field:
    return colours @ np.asarray((0.30, 0.59, 0.11), np.float32)


def _stretched(picture: NDArray[np.uint8]) -> Field:
    """Colours in [0, 1]; a picture's darkest places are 0 and its brightest 1, by night as by day."""
    colours = picture.astype(np.float32) / 255
    low, high = np.percentile(_grey(colours), (1, 99))
    return np.clip((colours - low) / max(0.1, high - low), 0, 1).astype(np.float32)


def _outlines(colours: Field, width: float) -> Field:
    """1 where a colour changes within about `width`, 0 where all are even."""
    slopes = [np.gradient(blurred(channel, width / 2)) for channel in np.moveaxis(colours, 2, 0)]
    steep = np.linalg.norm(np.stack(slopes).reshape(6, *colours.shape[:2]), axis=0)
    return _step(steep * width * min(colours.shape[:2]) - 0.2, 0.08)


def _step(value: Field, softness: float) -> Field:
    ramp = np.clip(value / (2 * softness) + 0.5, 0, 1)
    return ramp * ramp * (3 - 2 * ramp)


def _between(low: tuple[float, ...], high: tuple[float, ...], share: Field) -> Field:
    first, last = np.asarray(low, np.float32), np.asarray(high, np.float32)
    return first + share[..., None] * (last - first)


def _as_bytes(picture: Field) -> NDArray[np.uint8]:
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
