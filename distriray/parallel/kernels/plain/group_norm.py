"""Group norm by torch's operations."""

from __future__ import annotations

import torch

from distriray.parallel.kernels.rows_around import RowsAround
from distriray.parallel.moments import merge


def group_statistics(input: torch.Tensor, groups: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Mean and biased variance of each group of (batch, channels, ...): float32 (batch, groups, 2)."""
    grouped = input.reshape(input.shape[0], groups, -1)
    mean = grouped.mean(-1, keepdim=True, dtype=torch.float32)
    # Two passes: E[x^2] - E[x]^2 loses everything in float32 where the mean is large; and torch.var_mean
    # is ten times slower than this on a CPU.
    deviation = torch.linalg.vector_norm(grouped - mean, dim=-1, keepdim=True)
    variance = (deviation.square() / grouped.shape[-1]).float()  # of a float64 input it is not yet
    return torch.cat([mean, variance], -1, out=out)


def normalize(
    input: torch.Tensor,
    statistics: torch.Tensor,
    shares: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    around: RowsAround | None = None,
) -> torch.Tensor:
    """`Kernels.normalize`."""
    if around is not None:
        input = around.put(input, around.room(input))
    whole = statistics[0] if shares is None else merge(statistics, shares)
    mean, variance = whole.split(1, -1)
    channels, groups = input.shape[1], whole.shape[1]
    scale = torch.rsqrt(variance + eps)
    scale = scale.expand(-1, -1, channels // groups)
    if weight is not None:
        scale = scale * weight.view(groups, -1)
    shift = -mean * scale if bias is None else bias.view(groups, -1) - mean * scale
    shape = (input.shape[0], channels, *(1 for _ in input.shape[2:]))
    # In float32: half precision scales and shifts would cost ten times the rounding of `nn.GroupNorm`.
    output = (input.float() * scale.reshape(shape)).add_(shift.reshape(shape)).to(input.dtype)
    if around is not None:
        around.clear_zeros(output)
    return output
