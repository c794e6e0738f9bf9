"""Displaced patch parallelism for diffusers' U-Nets, transformers and VAEs: plain torch, no Ray."""

from distriray.parallel.engine import Engine, StepStatistics
from distriray.parallel.image import Image
from distriray.parallel.networks.registry import network_of
from distriray.parallel.parallelize import engine_of, parallelize

__all__ = ["Engine", "Image", "StepStatistics", "engine_of", "network_of", "parallelize"]
