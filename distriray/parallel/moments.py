"""Arithmetic of group norm: mean and variance of a whole from those of its parts."""

from __future__ import annotations

import torch


def merge(statistics: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Mean and variance of a whole from those of its parts (Chan et al. 1979), never negative.

    Args:
        statistics: float32 (ranks, batch, groups, 2), means and variances; a predicted variance below 0
            counts as 0.
        shares: float32 (ranks, 1, 1), each part's share of the elements.

    Returns:
        float32 (batch, groups, 2).
    """
    means, variances = statistics.unbind(-1)
    mean = (shares * means).sum(0)
    spread = means - mean
    variance = (shares * torch.addcmul(variances.clamp_min(0), spread, spread)).sum(0)
    return torch.stack([mean, variance], -1)


def correct(stale: torch.Tensor, own: torch.Tensor, rank: int, shares: torch.Tensor) -> torch.Tensor:
    """Corrected asynchronous group norm of the paper (Li et al. 2024, section 4.2).

    The stale moments E[x] and E[x^2] of the whole are shifted by the change of this rank's own. Where that
    gives a negative variance, this rank's own variance stands in, as in the paper.

    Args:
        stale: float32 (ranks, batch, groups, 2), all of the previous step, this rank's row too.
        own: float32 (batch, groups, 2), this rank's of this step.
        shares: float32 (ranks, 1, 1), each rank's share of the elements.

    Returns:
        float32 (batch, groups, 2).
    """
    moments, own_moments = _moments(stale), _moments(own)
    mean, square = ((shares.unsqueeze(-1) * moments).sum(0) + own_moments - moments[rank]).unbind(-1)
    variance = square - mean.square()
    return torch.stack([mean, torch.where(variance < 0, own[..., 1], variance)], -1)


def _moments(statistics: torch.Tensor) -> torch.Tensor:
    """E[x] and E[x^2] from means and variances, (..., 2)."""
    mean, variance = statistics.unbind(-1)
    return torch.stack([mean, variance + mean.square()], -1)
