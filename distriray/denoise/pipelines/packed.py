"""Common parts of the families whose pipelines pack latents into tokens: 2x2 into one, if none says else."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from distriray.denoise.pipelines.base import Commission
from distriray.denoise.pipelines.flow import FlowMatching
from distriray.denoise.pipelines.masks import outside


class PackedFlowMatching(FlowMatching):
    """Latents are packed for the network alone: a state has them as others do."""

    latents_per_input = 4
    patch_size = 2

    def sigmas(self, steps: int) -> Any:
        return np.linspace(1.0, 1 / steps, steps)

    def noise(self, commission: Commission, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return self._prepared(commission, self._plain.prepare_latents(*self._size(commission, dtype)))

    def noised(
        self, commission: Commission, dtype: torch.dtype, pictures: torch.Tensor, timesteps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        size = self._size(commission, dtype)
        prepared = self.pipeline_for(commission).prepare_latents(pictures, timesteps, *size)
        return self._prepared(commission, prepared)

    def masked(
        self, commission: Commission, dtype: torch.dtype, pictures: torch.Tensor, timesteps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        pipeline, size = self.pipeline_for(commission), self._size(commission, dtype)
        tokens, *apart = pipeline.prepare_latents(pictures, timesteps, *size)
        noise, image_latents = (self.unpack(each, commission.height, commission.width) for each in apart[:2])
        values = self._prepared(commission, (tokens, *apart[2:]))
        return {**values, **outside(pipeline, commission, noise, image_latents)}

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """(batch, channels, rows, columns) as (batch, tokens, channels)."""
        tokens: torch.Tensor = self._plain._pack_latents(latents, *latents.shape)
        return tokens

    def unpack(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(batch, tokens, channels) as (batch, channels, rows, columns) of a picture of that size."""
        latents: torch.Tensor = self._plain._unpack_latents(
            tokens, height, width, self._plain.vae_scale_factor
        )
        return latents.reshape(len(tokens), -1, *latents.shape[-2:])

    def _prepared(self, commission: Commission, prepared: Any) -> dict[str, torch.Tensor]:
        """`latents`, and where each of their tokens lies if the pipeline says so."""
        tokens, *ids = prepared if isinstance(prepared, tuple) else (prepared,)
        latents = self.unpack(tokens, commission.height, commission.width)
        return {"latents": latents, **({"img_ids": ids[0]} if ids else {})}
