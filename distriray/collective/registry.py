"""The backends by name. A new one is a module with a `join` and one line of `BACKENDS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType

import torch

from distriray.collective.base import Communicator
from distriray.collective.rendezvous import Rendezvous


@dataclass(frozen=True)
class Backend:
    """One way to move bytes.

    Attributes:
        module: imported when the backend is first used. Its `join(rendezvous)` makes the communicator, or
            raises the `ModuleNotFoundError` that says what to install.
        device: the type of device whose tensors it moves; None for every type.
        alone: whether it is for gangs of one rank, and for no others.
    """

    module: str
    device: str | None = None
    alone: bool = False

    def refusal(self, device: torch.device, world_size: int) -> str | None:
        """Why it cannot move tensors on `device` among `world_size` ranks, or None if it can."""
        if self.alone and world_size > 1:
            return f"is for one rank, not {world_size}"
        if self.device not in (None, device.type):
            return f"moves {self.device.upper()} tensors, not {device}"
        return None

    @property
    def join(self) -> Callable[[Rendezvous], Communicator]:
        join: Callable[[Rendezvous], Communicator] = import_module(self.module).join
        return join


BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        "local": Backend("distriray.collective.local", alone=True),
        "gloo": Backend("distriray.collective.gloo", device="cpu"),
        "nccl": Backend("distriray.collective.nccl", device="cuda"),
    }
)
"""Every backend; of those that fit, the first is the default."""


def backend_of(device: torch.device | str, world_size: int) -> str:
    """The name of the backend that moves tensors on `device` among `world_size` ranks.

    Raises:
        ValueError: there is none; the message lists what there is.
    """
    place = torch.device(device)
    for name, backend in BACKENDS.items():
        if backend.refusal(place, world_size) is None:
            return name
    why = "; ".join(f"{name!r} {backend.refusal(place, world_size)}" for name, backend in BACKENDS.items())
    raise ValueError(f"no backend moves {place.type} tensors among {world_size} ranks: {why}")


def backend_named(
    name: str, device: torch.device | str | None, world_size: int
) -> tuple[Backend, torch.device]:
    """The backend `name`, and the device of its tensors: `device`, or the one that it is for.

    Raises:
        ValueError: no backend has that name, or it cannot move such tensors; the message names what can.
    """
    if name not in BACKENDS:
        *names, last = map(repr, BACKENDS)
        raise ValueError(f"no backend {name!r}; there are {', '.join(names)} and {last}")
    backend = BACKENDS[name]
    place = torch.device(device or backend.device or "cpu")
    refusal = backend.refusal(place, world_size)
    if refusal is not None:
        raise ValueError(f"backend {name!r} {refusal}; use {backend_of(place, world_size)!r}")
    return backend, place
