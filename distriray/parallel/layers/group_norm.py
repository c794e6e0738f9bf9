"""Group norm over an image whose rows are spread over the gang."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from distriray.config import GroupNormMode
from distriray.parallel.context import PatchContext
from distriray.parallel.moments import correct, group_statistics, merge

if TYPE_CHECKING:
    from distriray.parallel.exchange.steps import Step


class PatchGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` of the whole image, computed on one rank's rows (Li et al. 2024, section 4.2).

    Each rank contributes mean and (biased) variance of its own part of every group, in float32. Input and
    output are (batch, channels, this rank's rows, columns). Outside a step of an exchange it is
    `nn.GroupNorm`.
    """

    context: PatchContext | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.context is None or self.context.step is None:
            return super().forward(input)
        statistics = self._statistics(input, self.context.step, self.context.group_norm)
        mean, variance = statistics.split(1, -1)
        scale = torch.rsqrt(variance + self.eps)
        scale = scale.expand(-1, -1, self.num_channels // self.num_groups)
        if self.affine:
            scale = scale * self.weight.view(self.num_groups, -1)
            shift = self.bias.view(self.num_groups, -1) - mean * scale
        else:
            shift = -mean * scale
        shape = (input.shape[0], self.num_channels, *(1 for _ in input.shape[2:]))
        # In float32: half precision scales and shifts would cost ten times the rounding of `nn.GroupNorm`.
        output = (input.float() * scale.reshape(shape)).add_(shift.reshape(shape))
        return output.to(input.dtype)

    def _statistics(self, input: torch.Tensor, step: Step, mode: GroupNormMode) -> torch.Tensor:
        """Mean and variance to normalize with, float32 (batch, groups, 2)."""
        own = group_statistics(input, self.num_groups)
        if mode == "local" and step.displaced:
            return own
        shares = step.shares(input)
        if mode in ("fresh", "local"):
            return merge(step.gather(own), shares)
        everyone = step.read_statistics(own, input)
        if mode == "corrected" and step.displaced:
            # The correction needs this rank's row of the previous step, which sending overwrites.
            corrected = correct(everyone, own, step.rank, shares)
            step.send_statistics(own)
            return corrected
        step.send_statistics(own)
        return merge(everyone, shares)


def patch_group_norm(module: nn.GroupNorm, context: PatchContext) -> None:
    """Turn `module` into a `PatchGroupNorm` that looks its step up in `context`, in place."""
    module.__class__ = PatchGroupNorm
    assert isinstance(module, PatchGroupNorm)
    module.context = context
