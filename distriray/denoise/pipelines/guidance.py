"""Classifier-free guidance: of both branches in one batch, or by a call each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg

from distriray.denoise.state import DenoiseState


class ConditionalHalf:
    """The half of a batch of [unconditional, conditional] that is left when guidance is over.

    The same tensor from step to step, since that tells a gang that the text is the same.
    """

    def __init__(self) -> None:
        self._halves: dict[str, torch.Tensor] = {}

    def forget(self) -> None:
        """The next step is of another state, or from elsewhere."""
        self._halves.clear()

    def of(self, state: DenoiseState, name: str) -> torch.Tensor:
        """That of a value of `state`."""
        if name not in self._halves:
            self._halves[name] = state.values[name].chunk(2)[1]
        return self._halves[name]


def guided(output: torch.Tensor, state: DenoiseState) -> torch.Tensor:
    """The network's output for [unconditional, conditional] by the scale and the rescaling of a state.

    Args:
        output: (2 x batch, channels, rows, columns).
    """
    without, conditional = output.chunk(2)
    return guided_calls((conditional, without), state.guidance_scale, state.guidance_rescale)


def guided_calls(outputs: Sequence[torch.Tensor], scale: float, rescale: float = 0.0) -> torch.Tensor:
    """The outputs of [conditional, unconditional] by the scale, and rescaled; the first where it is alone."""
    if len(outputs) == 1:
        return outputs[0]
    conditional, without = outputs
    output = without + scale * (conditional - without)
    return rescale_noise_cfg(output, conditional, guidance_rescale=rescale) if rescale > 0.0 else output
