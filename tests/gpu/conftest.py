"""What tests of GPUs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

on_a_gpu = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=on_a_gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A GPU; or a CPU, so that a slip is found where there is none."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield request.param
