"""What all tests share."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.models import tiny_sdxl

# A claim is about values; how long an example takes depends on what else the machine does.
settings.register_profile("distriray", deadline=None)
settings.load_profile("distriray")
# Like every rank: threads that wait for one another spin, and take the processors from the ranks.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with SDXL's parts in small and random weights, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sdxl"
    tiny_sdxl().save_pretrained(folder)
    return folder
