"""Pictures beside each other."""

from __future__ import annotations

import numpy as np
from PIL import Image


def difference(one: Image.Image, other: Image.Image) -> int:
    """The largest between their values."""
    return int(np.abs(np.array(one, dtype=int) - np.array(other, dtype=int)).max())
