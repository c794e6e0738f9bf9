"""Measures of how alike two pictures are."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image


def largest_difference(ours: Image.Image, theirs: Image.Image) -> int:
    """The largest difference of a colour of two 8-bit pictures, of 255."""
    one, other = (np.asarray(picture, dtype=int) for picture in (ours, theirs))
    return int(np.abs(one - other).max())


def psnr(ours: Image.Image, theirs: Image.Image) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures, in dB; infinite where they are equal."""
    one, other = (np.asarray(picture, dtype=float) for picture in (ours, theirs))
    error = float(np.square(one - other).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf
