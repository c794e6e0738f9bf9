"""A tiny model of each family, once for the tests of a file."""

from __future__ import annotations

from typing import Any

import pytest

from distriray.denoise import Denoiser
from tests.edits import shrink
from tests.models import tiny_sd3
from tests.unit.flow_matching.families import MODELS


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def pipeline(model: str) -> Any:
    return MODELS[model]()


@pytest.fixture(scope="module")
def denoiser(pipeline: Any) -> Denoiser:
    return Denoiser(pipeline)


@pytest.fixture(scope="module")
def sd3() -> Any:
    return tiny_sd3()


@pytest.fixture(autouse=True)
def small_megapixels(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
