"""Group norm over an image whose rows are spread over the gang."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from distriray.parallel.exchange.exchange import Exchanging


class PatchGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` of the whole image, computed on one rank's rows.

    Each rank contributes mean and (biased) variance of its own part of every group, in float32. Without an
    active exchange it is `nn.GroupNorm`.
    """

    engine: Exchanging | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        exchange = None if self.engine is None else self.engine.exchange
        if exchange is None:
            return super().forward(input)
        statistics = group_statistics(input, self.num_groups)
        if not (exchange.displacing and exchange.config.group_norm == "local"):
            statistics = exchange.statistics(statistics, input)
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


def group_statistics(input: torch.Tensor, groups: int) -> torch.Tensor:
    """Mean and biased variance of each group of (batch, channels, ...): float32 (batch, groups, 2)."""
    grouped = input.reshape(input.shape[0], groups, -1)
    mean = grouped.mean(-1, keepdim=True, dtype=torch.float32)
    # Two passes: E[x^2] - E[x]^2 loses everything in float32 where the mean is large; and torch.var_mean
    # is ten times slower than this on a CPU.
    deviation = torch.linalg.vector_norm(grouped - mean, dim=-1, keepdim=True)
    return torch.cat([mean, deviation.square() / grouped.shape[-1]], -1)


def merge(statistics: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Mean and variance of a whole from those of its parts (Chan et al. 1979), never negative.

    Args:
        statistics: (ranks, batch, groups, 2), means and variances; a predicted variance below 0 counts as 0.
        shares: (ranks, 1, 1), each part's share of the elements.

    Returns:
        (batch, groups, 2).
    """
    means, variances = statistics.unbind(-1)
    mean = (shares * means).sum(0)
    spread = means - mean
    variance = (shares * torch.addcmul(variances.clamp_min(0), spread, spread)).sum(0)
    return torch.stack([mean, variance], -1)


def correct(stale: torch.Tensor, own: torch.Tensor, rank: int, shares: torch.Tensor) -> torch.Tensor:
    """The paper's corrected asynchronous group norm (Li et al. 2024, section 4.2).

    The stale global moments E[x] and E[x^2] are shifted by the change of the own ones. Where that gives a
    negative variance the own variance stands in, as in the paper.

    Args:
        stale: (ranks, batch, groups, 2), all of the previous step, the own row too.
        own: (batch, groups, 2) of this step.
        shares: (ranks, 1, 1), each rank's share of the elements.

    Returns:
        (batch, groups, 2).
    """
    moments, own_moments = _moments(stale), _moments(own)
    mean, square = ((shares.unsqueeze(-1) * moments).sum(0) + own_moments - moments[rank]).unbind(-1)
    variance = square - mean.square()
    return torch.stack([mean, torch.where(variance < 0, own[..., 1], variance)], -1)


def _moments(statistics: torch.Tensor) -> torch.Tensor:
    """E[x] and E[x^2] from means and variances, (..., 2)."""
    mean, variance = statistics.unbind(-1)
    return torch.stack([mean, variance + mean.square()], -1)


def patch_group_norm(module: nn.GroupNorm, engine: Exchanging) -> None:
    """Turn `module` into a `PatchGroupNorm` of `engine`, in place."""
    module.__class__ = PatchGroupNorm
    assert isinstance(module, PatchGroupNorm)
    module.engine = engine
