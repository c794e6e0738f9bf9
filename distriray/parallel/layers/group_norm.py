"""Group norm over an image whose rows are spread over the gang."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from distriray.config import GroupNormMode
from distriray.parallel.context import PatchContext
from distriray.parallel.kernels.group_norm import group_norm_kernels
from distriray.parallel.moments import correct

if TYPE_CHECKING:
    from distriray.parallel.exchange.steps import Step
    from distriray.parallel.kernels.group_norm import GroupNormKernels


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
        kernels = group_norm_kernels(input.device.type)
        statistics, shares = self._statistics(input, self.context.step, self.context.group_norm, kernels)
        return kernels.normalize(input, statistics, shares, self.weight, self.bias, self.eps)

    def _statistics(
        self, input: torch.Tensor, step: Step, mode: GroupNormMode, kernels: GroupNormKernels
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Statistics to normalize with, and the share of each of them, as `GroupNormKernels.normalize`."""
        if mode == "local" and step.displaced:
            return kernels.group_statistics(input, self.num_groups)[None], None
        shares = step.shares(input)
        if mode in ("fresh", "local"):
            return step.gather(kernels.group_statistics(input, self.num_groups)), shares
        everyone = step.read_statistics(input, self.num_groups)
        if mode == "corrected" and step.displaced:
            # The correction needs this rank's row of the previous step, so its own come beside it first.
            own = kernels.group_statistics(input, self.num_groups)
            corrected = correct(everyone, own, step.rank, shares)
            everyone[step.rank] = own
            step.send_statistics(everyone)
            return corrected[None], None
        kernels.group_statistics(input, self.num_groups, out=everyone[step.rank])
        step.send_statistics(everyone)
        return everyone, shares


def patch_group_norm(module: nn.GroupNorm, context: PatchContext) -> None:
    """Turn `module` into a `PatchGroupNorm` that looks its step up in `context`, in place."""
    module.__class__ = PatchGroupNorm
    assert isinstance(module, PatchGroupNorm)
    module.context = context
