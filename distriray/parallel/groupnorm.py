"""Group norm over an image whose rows are spread over the gang."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from distriray.parallel.engine import Engine


class PatchGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` of the whole image, computed on one rank's rows.

    Each rank contributes mean and (biased) variance of its own part of every group, in float32. Without an
    active exchange it is `nn.GroupNorm`.
    """

    engine: Engine | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        exchange = None if self.engine is None else self.engine.exchange
        if exchange is None:
            return super().forward(input)
        own = group_statistics(input, self.num_groups)
        if exchange.displacing and exchange.config.group_norm == "local":
            mean, variance = own.unbind(-1)
        else:
            mean, variance = exchange.statistics(own, input)
        scale = torch.rsqrt(variance + self.eps)
        scale, shift = (
            s.repeat_interleave(self.num_channels // self.num_groups, 1) for s in (scale, -mean * scale)
        )
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        shape = (*scale.shape, *(1 for _ in input.shape[2:]))
        return (input * scale.to(input.dtype).view(shape)).add_(shift.to(input.dtype).view(shape))


def group_statistics(input: torch.Tensor, groups: int) -> torch.Tensor:
    """Mean and biased variance of each group of (batch, channels, ...): float32 (batch, groups, 2)."""
    grouped = input.reshape(input.shape[0], groups, -1)
    mean = grouped.mean(-1, dtype=torch.float32)
    # Two passes: E[x^2] - E[x]^2 loses everything in float32 where the mean is large; and torch.var_mean
    # is ten times slower than this on a CPU.
    deviation = torch.linalg.vector_norm(grouped - mean.unsqueeze(-1), dim=-1)
    return torch.stack([mean, deviation.square() / grouped.shape[-1]], -1)


def merge(statistics: torch.Tensor, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of a whole from those of its parts (Chan et al. 1979), never negative.

    Args:
        statistics: (ranks, batch, groups, 2), means and variances; a predicted variance below 0 counts as 0.
        shares: (ranks, 1, 1), each part's share of the elements.
    """
    means, variances = statistics.unbind(-1)
    mean = (shares * means).sum(0)
    return mean, (shares * (variances.clamp_min(0) + (means - mean).square())).sum(0)


def correct(
    stale: torch.Tensor, own: torch.Tensor, rank: int, shares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's corrected asynchronous group norm (Li et al. 2024, section 4.2).

    The stale global moments E[x] and E[x^2] are shifted by the change of the own ones. Where that gives a
    negative variance the own variance stands in, as in the paper.

    Args:
        stale: (ranks, batch, groups, 2), all of the previous step, the own row too.
        own: (batch, groups, 2) of this step.
    """
    means, variances = stale.unbind(-1)
    moments = torch.stack([means, variances + means.square()], -1)
    own_moments = torch.stack([own[..., 0], own[..., 1] + own[..., 0].square()], -1)
    mean, square = ((shares.unsqueeze(-1) * moments).sum(0) + own_moments - moments[rank]).unbind(-1)
    variance = square - mean.square()
    return mean, torch.where(variance < 0, own[..., 1], variance)


def patch_group_norm(module: nn.GroupNorm, engine: Engine) -> None:
    """Turn `module` into a `PatchGroupNorm` of `engine`, in place."""
    module.__class__ = PatchGroupNorm
    assert isinstance(module, PatchGroupNorm)
    module.engine = engine
