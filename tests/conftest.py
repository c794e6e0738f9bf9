"""What all tests share."""

import gc
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep together, where several processes run the tests, what shares a local Ray or starts processes."""
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group(item.path.parent.name))
        elif item.get_closest_marker("distributed"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_finish() -> None:
    """Look for garbage seldom, and not among what imports have made: it takes a seventh of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with SDXL's parts in small and random weights, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sdxl"
    tiny_sdxl().save_pretrained(folder)
    return folder
