"""A transformer of every family by two processes."""

from __future__ import annotations

import pytest
import torch

from distriray.collective import Communicator, launch
from tests.unit.parallel.transformers import TRANSFORMERS, Shape, draw, drawn, error

pytestmark = pytest.mark.distributed

PADDED = Shape(masked=True)


def all_families(communicator: Communicator) -> dict[str, torch.Tensor]:
    """The last latents of one image of each."""
    return {
        name: drawn(communicator, name, PADDED, exchange="sync", cfg_parallel=False)[0][-1]
        for name in TRANSFORMERS
    }


def test_sync_mode_of_every_family_equals_one_device() -> None:
    ours, theirs = launch(2, all_families)
    for name, transformer in TRANSFORMERS.items():
        assert torch.equal(ours[name], theirs[name])
        assert error(ours[name], draw(transformer.make(), transformer, PADDED)[-1]) < 1e-5
