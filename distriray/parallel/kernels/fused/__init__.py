"""Kernels of Triton, for GPUs."""

from distriray.parallel.kernels.fused.few_bits import decode, encode
from distriray.parallel.kernels.fused.fit import Fit
from distriray.parallel.kernels.fused.group_norm import group_statistics, normalize

__all__ = ["Fit", "decode", "encode", "group_statistics", "normalize"]
