"""Changes in few bits, by torch's operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from distriray.parallel.kernels.few_bits import GROUP, SCALE_BYTES, groups_of, packed_bytes


def encode(values: torch.Tensor, known: torch.Tensor, bits: int) -> torch.Tensor:
    """`Kernels.encode`."""
    groups, levels = groups_of(known.numel()), 2**bits - 1
    change = (values.float() - known.float()).flatten()
    change = F.pad(change, (0, groups * GROUP - len(change))).view(groups, GROUP)
    scales = (change.abs().amax(1, keepdim=True) * (2 / levels)).bfloat16()
    inverse = torch.where(scales > 0, scales.float().reciprocal(), 0.0)
    # The nearest of the levels, which lie half a scale from zero and a scale apart: `byte` cuts off.
    numbers = change.mul_(inverse).add_((levels + 1) / 2).clamp_(0, levels).byte()
    _add(known, scales, numbers, levels)
    packed, *parts = numbers.split(packed_bytes(bits), 1)
    for index, part in enumerate(parts, 1):
        packed = packed | (part << (index * bits))
    return torch.cat([scales.view(torch.uint8), packed], 1).flatten()


def decode(message: torch.Tensor, known: torch.Tensor, bits: int, into: torch.Tensor | None = None) -> None:
    """`Kernels.decode`."""
    levels = 2**bits - 1
    scales, packed = message.view(groups_of(known.numel()), -1).tensor_split([SCALE_BYTES], 1)
    numbers = torch.cat([(packed >> shift) & levels for shift in range(0, 8, bits)], 1)
    _add(known, scales.contiguous().view(torch.bfloat16), numbers, levels)
    if into is not None:
        into.copy_(known)


def _add(known: torch.Tensor, scales: torch.Tensor, numbers: torch.Tensor, levels: int) -> None:
    # The product has as many digits as float32: the sum is rounded once, wherever it is worked out.
    change = (numbers.float() - levels / 2).mul_(scales.float()).view(-1)[: known.numel()]
    known.copy_(change.view(known.shape).add_(known))
