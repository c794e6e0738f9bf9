"""One image as prepare, step x n, decode, with everything it is between two steps in one state."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distriray.denoise.denoiser import Denoiser as Denoiser
    from distriray.denoise.schedulers import SCHEDULERS as SCHEDULERS
    from distriray.denoise.state import DenoiseState as DenoiseState

# Imported when asked for: what is light in here, `pipelines.registry`, is for processes without torch too.
_HOMES = {"SCHEDULERS": "schedulers", "DenoiseState": "state", "Denoiser": "denoiser"}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
