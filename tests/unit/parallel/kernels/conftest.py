"""Where kernels of Triton run: in its interpreter everywhere, compiled where there is a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from unittest.mock import patch

import pytest
import torch

Run = Callable[..., None]

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Run]:
    """Runs a check in a process of its own: whether Triton interprets is settled when it is imported."""
    if find_spec("triton") is None:
        pytest.skip("needs triton")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with patch.dict(os.environ, TRITON_INTERPRET="1"):
            pool.submit(torch.set_num_threads, 1).result()  # starts the process
        yield lambda check, *case: pool.submit(check, "cpu", *case).result()


@pytest.fixture(
    params=[
        pytest.param("interpreter", marks=pytest.mark.distributed),
        pytest.param("cuda", marks=[pytest.mark.gpu, CUDA]),
    ]
)
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a check: a function of a device and of its case."""
    if request.param == "cuda":
        return lambda check, *case: check("cuda", *case)
    return request.getfixturevalue("interpreter")
