"""What the training commands share: averaged weights, resumable checkpoints, the learning rate's course."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def to_float(pictures: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def cosine(step: int, steps: int, peak: float, warmup: int) -> float:
    """The learning rate at a step: up over `warmup` steps, then down a cosine to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class Average:
    """An exponential moving average of a model's weights, with a shorter memory in the first steps."""

    def __init__(self, source: nn.Module, decay: float) -> None:
        self.source, self.decay = source, decay
        self.model = copy.deepcopy(source).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        mine = [parameter.data for parameter in self.model.parameters()]
        torch._foreach_lerp_(mine, [parameter.data for parameter in self.source.parameters()], weight)

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)


class Checkpoint:
    """One file with the state of several objects and the number of steps done."""

    def __init__(self, path: Path, parts: dict[str, Any]) -> None:
        self.path, self.parts = path, parts

    def restore(self) -> int:
        """Loads the file if it exists; returns the number of steps done."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, map_location="cpu")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        return int(state["step"])

    def save(self, step: int) -> None:
        """Replaces the file in one go, so that an interruption leaves a whole one."""
        partial = self.path.with_suffix(".partial")
        torch.save({"step": step} | {name: part.state_dict() for name, part in self.parts.items()}, partial)
        partial.rename(self.path)
