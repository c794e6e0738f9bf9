"""Points that work has passed: of a device, or of all ranks together."""

from __future__ import annotations

import torch

from distriray.collective import Communicator, all_gather


def barrier(communicator: Communicator) -> None:
    """Return once every rank has come here; waiting costs next to no CPU."""
    all_gather(communicator, list(torch.zeros(communicator.world_size, 1, device=communicator.device))).wait()
    finish(communicator.device)


def finish(device: torch.device) -> None:
    """Return once a device has done all that it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
