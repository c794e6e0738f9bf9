"""A point that all ranks pass together."""

from __future__ import annotations

import torch

from distriray.collective import Communicator, all_gather


def barrier(communicator: Communicator) -> None:
    """Return once every rank has come here; waiting costs no CPU."""
    all_gather(communicator, list(torch.zeros(communicator.world_size, 1, device=communicator.device))).wait()
    if communicator.device.type == "cuda":
        torch.cuda.synchronize(communicator.device)
