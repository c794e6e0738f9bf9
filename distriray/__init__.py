"""Displaced patch parallelism for diffusion models, served by elastic gangs of workers on Ray.

Importing this package is light: torch, diffusers and Ray are loaded with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from distriray.version import __version__

if TYPE_CHECKING:
    from distriray.client import AsyncClient as AsyncClient
    from distriray.client import Client as Client
    from distriray.config import ParallelConfig as ParallelConfig
    from distriray.config import Prediction as Prediction
    from distriray.denoise import Denoiser as Denoiser
    from distriray.denoise import DenoiseState as DenoiseState
    from distriray.gang import Host as Host
    from distriray.gang import HostConfig as HostConfig
    from distriray.handle import HandleClient as HandleClient
    from distriray.limits import Limits as Limits
    from distriray.parallel import engine_of as engine_of
    from distriray.parallel import parallelize as parallelize
    from distriray.requests import GenerationRequest as GenerationRequest
    from distriray.requests import SamplingParams as SamplingParams
    from distriray.results import GenerationResult as GenerationResult

_HOMES = {
    "AsyncClient": "client",
    "Client": "client",
    "DenoiseState": "denoise",
    "Denoiser": "denoise",
    "GenerationRequest": "requests",
    "GenerationResult": "results",
    "HandleClient": "handle",
    "Host": "gang",
    "HostConfig": "gang",
    "Limits": "limits",
    "ParallelConfig": "config",
    "Prediction": "config",
    "SamplingParams": "requests",
    "engine_of": "parallel",
    "parallelize": "parallel",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
