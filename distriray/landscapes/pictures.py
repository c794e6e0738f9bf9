"""Pictures as networks take them, and how near two of them are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_float(pictures: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(restored: Tensor, pictures: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture, (batch,), for values in [-1, 1]."""
    error = (restored.clamp(-1, 1) - pictures).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error / 4)
