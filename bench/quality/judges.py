"""Judges: how alike two pictures of one seed are, and how good a set of landscapes is."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from bench.quality.prompts import Prompt
from distriray.landscapes.checker import agreement, load_checker, to_input
from distriray.landscapes.draw import draw
from distriray.landscapes.scene import HELD_OUT_SEED, sample_scene

Pictures = NDArray[np.uint8]
Measures = Mapping[str, NDArray[np.float64]]
"""Arrays with one entry, or one row, a picture."""

IDENTICAL_DB = 100.0  # what identical pictures count as in a mean; two that differ in one value have 101 dB
JUST_NOTICEABLE = 2.3  # in CIELAB (Mahy, Van Eycken and Oosterlinck 1994)
ALIKE_SHARE = 0.01  # pictures look alike if at most this share of their pixels differs by more
FIRST_DRAWING = HELD_OUT_SEED + 50_000


class MissingExtra(RuntimeError):
    """A measure needs a package that is not installed."""


def require(*modules: str) -> None:
    """Raise `MissingExtra` unless all modules are installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"bench.quality needs {', '.join(missing)}, not installed here: pip install -e '.[quality]'"
        )


class Judge(Protocol):
    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what `summarize` gives."""

    def measure(
        self, pictures: Pictures, alone: Pictures, prompts: list[Prompt]
    ) -> dict[str, NDArray[np.float64]]:
        """What each picture is, and how it differs from one device's.

        Args:
            pictures: (N, height, width, 3).
            alone: the same prompts and seeds by one device.
        """

    def summarize(self, row: Measures, alone: Measures) -> tuple[str, ...]:
        """A cell for each of `columns`, over all pictures of a row and the same pictures by one device."""


def differences(pictures: Pictures, alone: Pictures) -> dict[str, NDArray[np.float64]]:
    """PSNR in dB of the 8-bit pictures, SSIM, and the share of pixels that visibly differ; one a picture."""
    from skimage.color import rgb2lab
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    ours, theirs = as_floats(pictures), as_floats(alone)
    psnr = peak_signal_noise_ratio(ours, theirs, data_range=1.0, reduction="none", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(ours, theirs, data_range=1.0, reduction="none")
    distance = np.linalg.norm(rgb2lab(pictures) - rgb2lab(alone), axis=-1)
    return {
        "psnr": psnr.double().clamp(max=IDENTICAL_DB).numpy(),
        "ssim": ssim.double().numpy().reshape(-1),
        "visible": (distance > JUST_NOTICEABLE).mean(axis=(1, 2)),
    }


def as_floats(pictures: Pictures) -> torch.Tensor:
    """(N, 3, height, width) in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def alike(measures: Measures) -> NDArray[np.bool_]:
    """Which pictures a person would not tell from one device's."""
    pictures: NDArray[np.bool_] = measures["visible"] <= ALIKE_SHARE
    return pictures


class LandscapeJudge:
    """Judges drawn landscapes by the checker that ships with distriray.

    The checker-feature distance is built as LPIPS is (Zhang et al. 2018) on the checker's four convolution
    blocks, without learnt weights: features of unit length at every place, their squared difference, averaged
    over places and summed over blocks. The Fréchet distance is that of FID, on the last block's 64 channels
    averaged over places. Neither can be compared with LPIPS or FID, and Fréchet distances only at equal
    counts.

    Args:
        size: of the pictures, in pixels a side.
        drawings: how many drawn scenes the Fréchet distance compares with.
    """

    columns = ("checker-feature distance", "Fréchet, drawn", "Fréchet, one device", "prompt accuracy")

    def __init__(self, size: int, drawings: int) -> None:
        self._checker = load_checker()
        self._size = size
        self._drawings = drawings
        self._drawn: NDArray[np.float64] | None = None

    def measure(
        self, pictures: Pictures, alone: Pictures, prompts: list[Prompt]
    ) -> dict[str, NDArray[np.float64]]:
        ours, theirs = self._blocks(pictures), self._blocks(alone)
        distance = sum(
            (functional.normalize(a, dim=1) - functional.normalize(b, dim=1)).square().sum(1).mean((1, 2))
            for a, b in zip(ours, theirs, strict=True)
        )
        assert isinstance(distance, torch.Tensor)
        answers = [
            agreement(prompt.said, seen)
            for prompt, seen in zip(prompts, self._checker.read(pictures), strict=True)
        ]
        return {
            **differences(pictures, alone),
            "distance": distance.double().numpy(),
            "features": ours[-1].mean((2, 3)).double().numpy(),
            "stated": np.array([len(answer) for answer in answers], dtype=np.float64),
            "right": np.array([sum(answer.values()) for answer in answers], dtype=np.float64),
        }

    def summarize(self, row: Measures, alone: Measures) -> tuple[str, ...]:
        stated = row["stated"].sum()
        return (
            f"{row['distance'].mean():.4f}",
            frechet_cell(row["features"], self._drawn_features()),
            frechet_cell(row["features"], alone["features"]),
            f"{row['right'].sum() / stated:.1%}" if stated else "-",
        )

    def floor(self, count: int) -> float | None:
        """The Fréchet distance of `count` other drawn scenes: what perfect pictures would have.

        None of a single one, which has no covariance.
        """
        if count < 2:
            return None
        other = self._features_of_drawings(FIRST_DRAWING + self._drawings, count)
        return round(frechet_distance(other, self._drawn_features()), 3)

    def _drawn_features(self) -> NDArray[np.float64]:
        if self._drawn is None:
            self._drawn = self._features_of_drawings(FIRST_DRAWING, self._drawings)
        return self._drawn

    def _features_of_drawings(self, first: int, count: int) -> NDArray[np.float64]:
        size = self._size
        return np.concatenate(
            [
                self._blocks(draw(sample_scene(first + i), size, size)[None])[-1]
                .mean((2, 3))
                .double()
                .numpy()
                for i in range(count)
            ]
        )

    @torch.no_grad()
    def _blocks(self, pictures: Pictures) -> list[torch.Tensor]:
        """What each of the checker's convolution blocks makes of pictures: (N, channels, rows, columns)."""
        values, blocks = to_input(pictures), []
        for layer in self._checker.features:
            values = layer(values)
            if isinstance(layer, torch.nn.MaxPool2d):
                blocks.append(values)
        return blocks


def frechet_distance(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    """Between Gaussians fitted to two sets of features, (N, dimensions) each (Heusel et al. 2017)."""
    a, b = np.cov(ours, rowvar=False), np.cov(theirs, rowvar=False)
    means = ours.mean(0) - theirs.mean(0)
    # The trace of a matrix' root is the sum of its eigenvalues' roots.
    root = np.sqrt(np.linalg.eigvals(a @ b).real.clip(min=0)).sum()
    return max(0.0, float(means @ means + np.trace(a) + np.trace(b) - 2 * root))


def frechet_cell(ours: NDArray[np.float64], theirs: NDArray[np.float64] | None) -> str:
    """The distance, or a dash where there is nothing to compare with or a covariance would be singular."""
    if theirs is None or len(ours) <= ours.shape[1]:
        return "-"
    return f"{frechet_distance(ours, theirs):.3f}"
