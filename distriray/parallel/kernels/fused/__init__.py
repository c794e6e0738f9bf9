"""Kernels of Triton, for GPUs."""

from distriray.parallel.kernels.fused.few_bits import decode, encode
from distriray.parallel.kernels.fused.group_norm import group_statistics, normalize

__all__ = ["decode", "encode", "group_statistics", "normalize"]
