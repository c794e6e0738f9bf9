"""The network's output in one step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from distriray.denoise.schedulers import follows_flow


class NetworkOutput(NamedTuple):
    """The output of one step's network, and what it is about; nobody writes into these tensors later.

    Attributes:
        latents: the noisy ones before the step, (batch, channels, rows, columns).
        output: with guidance, of the same shape.
        timestep: on the host.
    """

    latents: torch.Tensor
    output: torch.Tensor
    timestep: torch.Tensor

    def original(self, scheduler: Any) -> torch.Tensor:
        """x0 of the noisy latents by the output, in float32.

        By a noise schedule (Song et al. 2021, arXiv 2010.02502, equation 12), or by flow matching, whose
        output is noise less picture (Esser et al. 2024, arXiv 2403.03206, equation 13).
        """
        x, output = self.latents.float(), self.output.float()
        if follows_flow(scheduler):
            first = (scheduler.timesteps == self.timestep).nonzero()[0]
            return x - float(scheduler.sigmas[first]) * output
        alpha = float(scheduler.alphas_cumprod[int(self.timestep)])
        if float(scheduler.init_noise_sigma) != 1.0:  # latents of these schedulers grow with sigma
            x = x * alpha**0.5
        kind = scheduler.config.prediction_type
        if kind == "v_prediction":
            return alpha**0.5 * x - (1 - alpha) ** 0.5 * output
        if kind == "epsilon":
            return (x - (1 - alpha) ** 0.5 * output) / alpha**0.5
        return output
