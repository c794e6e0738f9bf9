"""Kernels put together from torch's operations, for every device."""

from distriray.parallel.kernels.plain.few_bits import decode, encode
from distriray.parallel.kernels.plain.fit import Fit
from distriray.parallel.kernels.plain.group_norm import group_statistics, normalize

__all__ = ["Fit", "decode", "encode", "group_statistics", "normalize"]
