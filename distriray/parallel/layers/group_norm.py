"""Group norm over an image whose rows are spread over the gang."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distriray.parallel.context import PatchContext
from distriray.parallel.kernels.choice import kernels_of
from distriray.parallel.layers.opaque import Opaque
from distriray.parallel.moments import correct
from distriray.parallel.partition import Window

if TYPE_CHECKING:
    from distriray.parallel.exchange.step import Step
    from distriray.parallel.kernels.choice import Kernels


class PatchGroupNorm(nn.GroupNorm, Opaque):
    """`nn.GroupNorm` of the whole image, computed on one rank's rows (Li et al. 2024, section 4.2).

    Each rank contributes mean and (biased) variance of its own part of every group, in float32, whatever the
    precision of the input. Input and output are (batch, channels, this rank's rows, columns). Outside a step
    of an exchange it is `nn.GroupNorm`.

    Attributes:
        window: of the convolution that alone reads the output, if there is one. In a step that fuses, the
            output then has the rows around this rank's too, which its peers sent with their statistics.
    """

    context: PatchContext | None = None
    window: Window | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.context is None or not self.context.exchanges:
            return super().forward(input)
        return self.exchange(input)

    def exchanged_shape(self, *inputs: Any) -> tuple[int, ...]:
        batch, channels, rows, columns = inputs[0].shape
        if self.window is not None and self.context is not None and self.context.fuses:
            rows += self.window.reach - 1
        return batch, channels, rows, columns

    def exchanged(self, *inputs: Any) -> torch.Tensor:
        (input,) = inputs
        assert self.context is not None and self.context.step is not None
        step = self.context.step
        kernels = kernels_of(input.device.type)
        affine = self.weight, self.bias, self.eps
        if self.window is None or not step.fuses:
            statistics, shares = self._statistics(input, step, kernels)
            return kernels.normalize(input, statistics, shares, *affine)
        measure = partial(kernels.group_statistics, input, self.num_groups)
        around, statistics = step.rows_around(input, self.window, self.num_groups, measure)
        return kernels.normalize(input, statistics, step.shares(input), *affine, around)

    def _statistics(
        self, input: torch.Tensor, step: Step, kernels: Kernels
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Statistics to normalize with, and the share of each of them, as `Kernels.normalize`."""
        if step.statistics == "local":
            return kernels.group_statistics(input, self.num_groups)[None], None
        shares = step.shares(input)
        everyone = step.read_statistics(input, self.num_groups)
        if step.statistics == "corrected":
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
    module.enroll()
