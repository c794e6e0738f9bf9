"""How a gang denoises: one frozen, validated configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

ExchangeMode = Literal["displaced", "sync", "none"]
GroupNormMode = Literal["stale", "corrected", "fresh", "local"]

Weight = Annotated[float, Field(ge=0.0, le=1.0)]


class Prediction(BaseModel):
    """Extrapolation weights w of stale values: last + w * (last - one before). 0 turns a kind off.

    Attributes:
        statistics: of group norm's statistics; `auto` is 0.75 between two patches and 0.5 among more, where
            a larger weight loses when steps are few (docs/measurements.md, Fidelity).
        halos: of the rows around a patch.
        keys_values: of self-attention's keys and values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    statistics: Weight | Literal["auto"] = "auto"
    halos: Weight = 0.0
    keys_values: Weight = 0.0

    def statistics_among(self, patches: int) -> float:
        """The weight of group-norm statistics among that many patches."""
        if self.statistics == "auto":
            return 0.75 if patches == 2 else 0.5
        return self.statistics


class ParallelConfig(BaseModel):
    """How the ranks of a gang share one denoising step.

    Attributes:
        exchange: `displaced` uses the other patches' activations of the previous step (Li et al., CVPR
            2024); `sync` exchanges fresh ones at every layer and gives one device's numbers; `none`
            exchanges nothing but the output, the naive baseline.
        warmup_steps: synchronous steps at the start of every image (the first one always is), or `auto`:
            until the drift of what is sent falls below `auto_warmup_drift`.
        auto_warmup_drift: relative change of the sent activations between two steps, largest over ranks.
        group_norm: whose statistics a displaced group norm uses: the peers' previous ones (`stale`), those
            shifted by this rank's own change (`corrected`, as in the paper), `fresh` ones, or only its own
            (`local`).
        prediction: extrapolation of stale values.
        cfg_parallel: give each half of an even gang one half of the batch: with classifier-free guidance
            the unconditional and the conditional pass. `auto` does so whenever gang and batch are even.
        parallel_vae: the ranks decode the picture together, each its own rows, exactly; all of them must ask
            for the picture then. Otherwise, and where the VAE cannot be cut, every rank decodes all of it.
        cuda_graphs: on a GPU, launch a step that was met before as a few CUDA graphs rather than kernel by
            kernel; elsewhere nothing changes.
        max_buffer_bytes: bound on exchange buffers kept for shapes not in use.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    exchange: ExchangeMode = "displaced"
    warmup_steps: Annotated[int, Field(ge=0)] | Literal["auto"] = 4
    auto_warmup_drift: Annotated[float, Field(gt=0.0)] = 0.12
    group_norm: GroupNormMode = "stale"
    prediction: Prediction = Prediction()
    cfg_parallel: bool | Literal["auto"] = "auto"
    parallel_vae: bool = True
    cuda_graphs: bool = True
    max_buffer_bytes: Annotated[int, Field(ge=0)] = 4 * 2**30
