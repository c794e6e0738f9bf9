"""Decides from a picture alone which value each attribute has: a small classifier trained on drawn scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from distriray.landscapes.captions import Labels
from distriray.landscapes.scene import ATTRIBUTES

CHECKER_FILE: Path = Path(__file__).parent / "checker.safetensors"


def to_input(pictures: NDArray[np.uint8]) -> Tensor:
    """Pictures of one size, (N, H, W, 3) uint8, as the checker sees them: (N, 3, 128, 128) in [-1, 1]."""
    floats = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return functional.interpolate(floats, (128, 128), mode="area")


class Checker(nn.Module):
    """Logits for each attribute's values from a picture of any size."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 24), (24, 32), (32, 48), (48, 64)):
            layers += [
                nn.Conv2d(before, after, 3, padding=1),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.features = nn.Sequential(*layers, nn.Conv2d(64, 16, 1), nn.Flatten(), nn.Dropout(0.1))
        self.hidden = nn.Linear(16 * 64, 128)
        self.logits = nn.Linear(128, sum(len(values) for values in ATTRIBUTES.values()))

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """One (N, values) block of logits for each attribute, from `to_input`'s pictures."""
        logits = self.logits(self.hidden(self.features(inputs)).relu())
        return list(logits.split([len(values) for values in ATTRIBUTES.values()], dim=1))

    @torch.no_grad()
    def read(self, pictures: NDArray[np.uint8]) -> list[Labels]:
        """Every attribute's likeliest value in each picture of (N, H, W, 3) uint8."""
        best = [block.argmax(dim=1).tolist() for block in self(to_input(pictures))]
        return [
            {name: values[index] for (name, values), index in zip(ATTRIBUTES.items(), row, strict=True)}
            for row in zip(*best, strict=True)
        ]


def load_checker(path: Path = CHECKER_FILE) -> Checker:
    """The trained checker, ready to read pictures."""
    checker = Checker()
    checker.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()}, strict=False)
    return checker.eval()


def agreement(said: Labels, seen: Labels) -> dict[str, bool]:
    """For each attribute that a caption states: does the picture show it?"""
    return {name: seen[name] == value for name, value in said.items()}
