"""Displaced patch parallelism for diffusers' U-Nets, transformers and VAEs: plain torch, no Ray."""

from distriray.parallel.compiled import compile_blocks, many_shapes
from distriray.parallel.engine import Engine
from distriray.parallel.image import Image
from distriray.parallel.networks.registry import network_of
from distriray.parallel.parallelize import engine_of, parallelize
from distriray.parallel.statistics import StepStatistics

__all__ = [
    "Engine",
    "Image",
    "StepStatistics",
    "compile_blocks",
    "engine_of",
    "many_shapes",
    "network_of",
    "parallelize",
]
