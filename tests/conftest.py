"""What all tests share."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from tests.compiling import CountingCompiler
from tests.models import tiny_sdxl

# A claim is about values; how long an example takes depends on what else the machine does.
settings.register_profile("distriray", deadline=None)
settings.load_profile("distriray")
# Like every rank: threads that wait for one another spin, and take the processors from the ranks.
torch.set_num_threads(1)


class Together(LoadScopeScheduling):
    """Keeps in one process what shares a local Ray, and the tests of a file that start processes."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        folder = path.split("/")[1]
        return {"gang": folder, "jobs": folder, "serve": folder, "distributed": path}.get(folder, nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    return Together(config, log)


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


@pytest.fixture
def compiler() -> Iterator[CountingCompiler]:
    """What counts the graphs that torch compiles; it knows none before, and forgets these afterwards."""
    torch._dynamo.reset()
    yield CountingCompiler()
    torch.compiler.set_stance("default")
    torch._dynamo.reset()
