"""Judges pictures of any model as the paper does: LPIPS against one device, and FID."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bench.quality.judges import Measures, Pictures, as_floats, differences, frechet_cell, require
from bench.quality.prompts import Prompt


class PhotoJudge:
    """LPIPS (AlexNet) through torchmetrics, FID on clean-fid's Inception features; both are downloaded.

    Args:
        reference: a folder of pictures, COCO's say, for the FID against the truth.
        device: where the networks run.

    Raises:
        MissingExtra: torchvision or clean-fid is not installed.
        NotADirectoryError: `reference` is no folder.
    """

    columns = ("LPIPS", "FID, reference", "FID, one device")

    def __init__(self, reference: Path | None, device: str) -> None:
        require("torchvision", "cleanfid")
        if reference is not None and not reference.is_dir():
            raise NotADirectoryError(f"--reference {reference} is no folder of pictures")
        from cleanfid import fid
        from cleanfid.resize import build_resizer
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self._device = torch.device(device)
        self._reference = reference
        self._truth: NDArray[np.float64] | None = None
        self._fid = fid
        self._resize = build_resizer("clean")
        self._inception = fid.build_feature_extractor("clean", self._device, use_dataparallel=False)
        self._lpips = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(self._device)

    @torch.no_grad()
    def measure(
        self, pictures: Pictures, alone: Pictures, prompts: list[Prompt]
    ) -> dict[str, NDArray[np.float64]]:
        ours, theirs = (as_floats(side).to(self._device).split(1) for side in (pictures, alone))
        lpips = [float(self._lpips(a, b)) for a, b in zip(ours, theirs, strict=True)]
        resized = np.stack([self._resize(picture) for picture in pictures])
        batch = torch.from_numpy(resized).permute(0, 3, 1, 2)
        features = self._fid.get_batch_features(batch, self._inception, self._device)
        return {
            **differences(pictures, alone),
            "lpips": np.array(lpips),
            "features": features.astype(np.float64),
        }

    def summarize(self, row: Measures, alone: Measures) -> tuple[str, ...]:
        return (
            f"{row['lpips'].mean():.4f}",
            frechet_cell(row["features"], self._truth_features()),
            frechet_cell(row["features"], alone["features"]),
        )

    def _truth_features(self) -> NDArray[np.float64] | None:
        if self._truth is None and self._reference is not None:
            features = self._fid.get_folder_features(
                str(self._reference), self._inception, device=self._device, verbose=False
            )
            self._truth = features.astype(np.float64)
        return self._truth
