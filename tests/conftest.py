"""What all tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from tests.forks import forked_workers

if TYPE_CHECKING:
    from tests.compiling import CountingCompiler

# A claim is about values; how long an example takes depends on what else the machine does.
settings.register_profile("distriray", deadline=None)
settings.load_profile("distriray")

SECONDS = Path(__file__).with_name("seconds.txt")
"""Names the functions that took more than 0.2 s of a processor a case, and five that took more in all."""


class Together(LoadScopeScheduling):
    """Keeps in one process what shares a local Ray, and the tests of a file that start processes."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        folder = path.split("/")[1]
        return {"gang": folder, "jobs": folder, "serve": folder, "distributed": path}.get(folder, nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    return Together(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to `make test` what takes long (`tests/seconds.txt`), as what is marked where it stands."""
    long = set(SECONDS.read_text().split())
    for item in items:
        if item.nodeid.partition("[")[0] in long:
            item.add_marker(pytest.mark.sweep)


def pytest_collection() -> None:
    """Imports make no garbage that is worth a look: it would take a fifth of their time."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Look for garbage seldom, and not among what imports have made: it takes a seventh of the time."""
    gc.enable()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    import torch  # here, as below: who hands tests out to others does without

    # Like every rank: threads that wait for one another spin, and take the processors from the ranks.
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def workers_of_ray(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Ray's workers are there without seconds of import, if any test is to start a Ray."""
    rays = any(item.get_closest_marker("ray") for item in request.session.items)
    if rays and hasattr(os, "pidfd_open"):
        with forked_workers(tmp_path_factory.mktemp("ray")):
            yield
    else:
        yield


@pytest.fixture
def workers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Ray that a test starts has workers as users have them: its descendants, each with its imports."""
    monkeypatch.delenv("RAY_RUNTIME_ENV_HOOK", raising=False)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with SDXL's parts in small and random weights, as a folder."""
    from tests.models import tiny_sdxl

    folder = tmp_path_factory.mktemp("models") / "tiny-sdxl"
    tiny_sdxl().save_pretrained(folder)
    return folder


@pytest.fixture
def compiler() -> Iterator[CountingCompiler]:
    """What counts the graphs that torch compiles; it knows none before, and forgets these afterwards.

    Torch moves what a call found to the front of what was compiled for its code. A rank in another thread
    that is searching at that moment misses it and compiles again, so that the order is held still here.
    """
    import torch
    from torch._C._dynamo.eval_frame import _set_lru_cache

    from tests.compiling import CountingCompiler

    torch._dynamo.reset()
    _set_lru_cache(False)
    yield CountingCompiler()
    _set_lru_cache(True)
    torch.compiler.set_stance("default")
    torch._dynamo.reset()
