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
            raises the `ModuleNotFoundError` that says what to install, or `BackendUnavailable` on all ranks
            alike.
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
        "shm": Backend("distriray.collective.shm", device="cpu"),
        "gloo": Backend("distriray.collective.gloo", device="cpu"),
        "nccl": Backend("distriray.collective.nccl", device="cuda"),
    }
)
"""Every backend; of those that fit, the first that is available to the gang is the default."""


def backends_of(device: torch.device | str, world_size: int) -> list[str]:
    """The names of the backends that move tensors on `device` among `world_size` ranks, the best first.

    Raises:
        ValueError: there is none; the message lists what there is.
    """
    place = torch.device(device)
    names = [name for name, backend in BACKENDS.items() if backend.refusal(place, world_size) is None]
    if names:
        return names
    why = "; ".join(f"{name!r} {backend.refusal(place, world_size)}" for name, backend in BACKENDS.items())
    raise ValueError(f"no backend moves {place.type} tensors among {world_size} ranks: {why}")


def backends_named(
    name: str | None, device: torch.device | str | None, world_size: int
) -> tuple[dict[str, Backend], torch.device]:
    """The backend `name`, or else all that fit, the best first, and the device of their tensors: `device`, or
    the one that `name` is for, or the CPU.

    Raises:
        ValueError: no backend has that name, or it cannot move such tensors; the message names what can.
    """
    if name is None:
        place = torch.device(device or "cpu")
        return {fits: BACKENDS[fits] for fits in backends_of(place, world_size)}, place
    if name not in BACKENDS:
        *names, last = map(repr, BACKENDS)
        raise ValueError(f"no backend {name!r}; there are {', '.join(names)} and {last}")
    backend = BACKENDS[name]
    place = torch.device(device or backend.device or "cpu")
    refusal = backend.refusal(place, world_size)
    if refusal is not None:
        others = " or ".join(map(repr, backends_of(place, world_size)))
        raise ValueError(f"backend {name!r} {refusal}; use {others}")
    return {name: backend}, place
