"""How far latents and pictures are from one another."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

LIKENESS = 1e-5
"""Of the largest value: what other sums of the same numbers may differ by."""


def differs(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, of the largest value."""
    return float((one - other).abs().max() / other.abs().max())


def apart(picture: Image.Image, other: Image.Image) -> int:
    """The largest difference of two pictures, of 255."""
    return int(np.abs(np.array(picture, int) - np.array(other, int)).max())
