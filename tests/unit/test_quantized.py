"""Weights that were rounded are local to tokens: gangs draw what one quantized device draws."""

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


def by_gguf(transformer: torch.nn.Module) -> None:
    """Linear layers as diffusers makes them of a GGUF file of the type Q4_0."""
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q4_0
    for module in list(transformer.modules()):
        for name, linear in list(module.named_children()):
            if type(linear) is not torch.nn.Linear or linear.in_features % 32:  # numbers that share a scale
                continue
            rounded = GGUFLinear(linear.in_features, linear.out_features, compute_dtype=torch.float32)
            weight = gguf.quants.quantize(linear.weight.detach().numpy(), kind)
            rounded.weight = GGUFParameter(torch.from_numpy(weight), quant_type=kind)
            rounded.bias = linear.bias
            setattr(module, name, rounded)


def by_quanto(transformer: torch.nn.Module) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(transformer, weights=quanto.qint8)
    quanto.freeze(transformer)


@pytest.mark.parametrize("make", [tiny_flux, tiny_qwen_image, tiny_sd3])
@pytest.mark.parametrize("quantize", [by_gguf, by_quanto])
def test_weights_that_others_have_rounded_are_local_to_tokens_too(
    make: Callable[[], Any], quantize: Callable[[torch.nn.Module], None]
) -> None:
    def quantized() -> Any:
        pipeline = make()
        quantize(pipeline.transformer.requires_grad_(False))
        return pipeline

    expected, config = drawn(quantized()), ParallelConfig(exchange="sync", cfg_parallel=False)
    assert differs(drawn(make()), expected) > 1e-3, "it is rounded"
    for latents in run_in_lockstep(
        2, lambda communicator: drawn(parallelize(quantized(), communicator, config))
    ):
        assert differs(latents, expected) <= 1e-5


def test_without_torchao_a_model_that_is_to_be_quantized_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UnsupportedModel, match=r"'int8' needs torchao: pip install 'distriray\[quantize\]'"):
        load_pipeline(ModelSpec(name=str(tiny_model), quantize="int8"), "cpu")
