"""Weights that torchao has rounded are local to tokens: gangs draw what one quantized device draws."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, run_in_lockstep
from distriray.denoise import Denoiser
from distriray.errors import UnsupportedModel
from distriray.models import ModelSpec, load_pipeline
from distriray.parallel.networks.registry import denoising_module
from tests.models import tiny_flux, tiny_qwen_image, tiny_sd3, tiny_sdxl
from tests.unit.test_denoise import begin, finish

CALL: dict[str, Any] = {"prompt": "a lake", "num_inference_steps": 3, "height": 96, "width": 64}


def drawn(pipeline: Any) -> torch.Tensor:
    denoiser = Denoiser(pipeline)
    return finish(denoiser, begin(denoiser, [1], **CALL))


def differs(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, of the largest value."""
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("make", [tiny_flux, tiny_qwen_image, tiny_sd3, tiny_sdxl])
@pytest.mark.parametrize("quantize", ["int8", "float8"])
def test_a_gang_in_sync_draws_what_one_quantized_device_draws(
    make: Callable[[], Any], quantize: Literal["int8", "float8"], tmp_path: Path
) -> None:
    pytest.importorskip("torchao")
    make().save_pretrained(tmp_path)
    spec = ModelSpec(name=str(tmp_path), quantize=quantize)
    one, config = load_pipeline(spec, "cpu"), ParallelConfig(exchange="sync", cfg_parallel=False)
    linears = [layer for layer in denoising_module(one).modules() if type(layer) is torch.nn.Linear]
    assert linears and all(type(layer.weight.data) is not torch.Tensor for layer in linears)
    expected = drawn(one)
    assert differs(drawn(make()), expected) > 1e-3, "it is rounded"

    def rank(communicator: Communicator) -> torch.Tensor:
        return drawn(parallelize(load_pipeline(spec, "cpu"), communicator, config))

    for latents in run_in_lockstep(2, rank):
        assert differs(latents, expected) <= 1e-5


def test_without_torchao_a_model_that_is_to_be_quantized_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UnsupportedModel, match=r"'int8' needs torchao: pip install 'distriray\[quantize\]'"):
        load_pipeline(ModelSpec(name=str(tiny_model), quantize="int8"), "cpu")
