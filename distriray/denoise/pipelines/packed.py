"""Common parts of the families whose pipelines pack latents into tokens: 2x2 into one, if none says else."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from distriray.denoise.pipelines.base import Commission
from distriray.denoise.pipelines.flow import FlowMatching
from distriray.denoise.pipelines.guidance import guided_calls
from distriray.denoise.pipelines.masks import outside
from distriray.denoise.state import DenoiseState


class PackedFlowMatching(FlowMatching):
    """Latents are packed for the network alone: a state has them as others do.

    A step has a call for each branch of guidance, or one where there is one, by positions of both streams.
    """

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

    def step(self, state: DenoiseState) -> tuple[torch.Tensor, torch.Tensor]:
        own = self.pack(state.latents)
        tokens = self.beside(state, own)
        shared = {"hidden_states": tokens, "timestep": self.time(state, tokens.dtype)}
        outputs = self.outputs_of(state, lambda branch: {**shared, **self.arguments(state, branch)})
        output = self.guided([each[:, : own.shape[1]] for each in outputs], state.guidance_scale)
        output = self.unpack(output, state.height, state.width)
        return self.advanced(state, output), output

    def beside(self, state: DenoiseState, tokens: torch.Tensor) -> torch.Tensor:
        """A picture's tokens with what the network is shown beside them."""
        return self.with_references(state, tokens)

    def time(self, state: DenoiseState, dtype: torch.dtype) -> torch.Tensor:
        """The timestep of the next step as the network is given it, from 1 to 0; (batch,)."""
        return self.timestep(state, state.batch).to(dtype) / 1000

    def arguments(self, state: DenoiseState, branch: str) -> dict[str, Any]:
        """What else the network is given, for the branch whose values begin with that."""
        values = state.values
        return {
            "encoder_hidden_states": values[f"{branch}prompt_embeds"],
            "txt_ids": values["txt_ids"],
            "img_ids": values["img_ids"],
        }

    def guided(self, outputs: list[torch.Tensor], scale: float) -> torch.Tensor:
        """The outputs of [conditional, unconditional], (batch, tokens, channels), by the scale."""
        return guided_calls(outputs, scale)

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
