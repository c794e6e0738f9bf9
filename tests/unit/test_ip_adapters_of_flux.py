"""IP-Adapters of FLUX.1: as they are published, beside what else a request names, and which are refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetPipeline
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from distriray import ParallelConfig, parallelize
from distriray.adapters import AdapterSpec
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.controls import Control, ControlNetSpec
from distriray.denoise import Denoiser
from distriray.denoise.pipelines.registry import PIPELINES
from distriray.denoise.pipelines.sizes import configs_of
from distriray.errors import UnusableIPAdapter
from tests.edits import shrink
from tests.models import (
    save_ip_adapter,
    tiny_flux,
    tiny_flux_controlnet,
    tiny_flux_fill,
    tiny_flux_schnell,
    tiny_image_encoder,
    tiny_kontext,
    tiny_sd3,
    tiny_sdxl,
)
from tests.regroup import drawn
from tests.unit.test_ip_adapters import (
    BOTH,
    ONE,
    by_diffusers,
    denoiser_of,
    params,
    picture,
    spec,
    weights_of,
)

EDGES = picture("edges")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ip-adapters")
    for name in ("style", "face"):
        save_ip_adapter(folder, weights_of(tiny_flux(), name), name)
    return folder


def as_xlabs_has_it(weights: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The same weights by the names of the published files."""
    named = {f"ip_adapter_proj_model.{name}": tensor for name, tensor in weights["image_proj"].items()}
    for name, tensor in weights["ip_adapter"].items():
        block, projection, kind = name.split(".")
        of = projection.removeprefix("to_").removesuffix("_ip")
        named[f"double_blocks.{block}.processor.ip_adapter_double_stream_{of}_proj.{kind}"] = tensor
    return named


def test_a_published_file_is_read_as_diffusers_reads_it(folder: Path, tmp_path: Path) -> None:
    """By the image encoder's half of a whole CLIP, as they are published with."""
    vision = tiny_image_encoder()
    whole = CLIPModel(
        CLIPConfig(
            vision_config=vision.config.to_dict(),
            text_config={
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
            },
            projection_dim=vision.config.projection_dim,
        )
    )
    whole.load_state_dict(vision.state_dict(), strict=False)
    whole.save_pretrained(tmp_path / "clip")
    save_file(as_xlabs_has_it(weights_of(tiny_flux(), "style")), tmp_path / "style.safetensors")
    denoiser = Denoiser(tiny_flux())
    denoiser.ip_adapters.load(spec(tmp_path, "style", image_encoder="clip"))
    ours = drawn(denoiser, denoiser.prepare(params(*ONE)))
    pipeline = tiny_flux()
    pipeline.load_ip_adapter(
        str(tmp_path),
        weight_name="style.safetensors",
        image_encoder_pretrained_model_name_or_path=str(tmp_path / "clip"),
        image_encoder_dtype=torch.float32,
    )
    pipeline.set_ip_adapter_scale(ONE[0][1])
    theirs = pipeline(
        prompt="a lake",
        ip_adapter_image=picture("style"),
        height=128,
        width=64,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    assert np.abs(ours - np.asarray(theirs, dtype=int)).max() <= 1
    plainly = denoiser_of(tiny_flux(), folder, ["style"])
    assert (ours == drawn(plainly, plainly.prepare(params(*ONE)))).all()


def test_what_does_not_fit_is_refused_by_name_when_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    denoiser = denoiser_of(tiny_flux(), folder, ["style"])
    expected = drawn(denoiser, denoiser.prepare(params()))
    save_ip_adapter(tmp_path, weights_of(tiny_flux(), "face"), "face")
    whole = as_xlabs_has_it(weights_of(tiny_flux(), "face"))

    def refused(name: str, without: str = "", **more: torch.Tensor) -> str:
        kept = {key: value for key, value in whole.items() if key != without}
        save_file({**kept, **more}, tmp_path / f"{name}.safetensors")
        with pytest.raises(UnusableIPAdapter, match=f"IP-Adapter '{name}' cannot be used") as error:
            denoiser.ip_adapters.load(spec(tmp_path, name))
        assert denoiser.ip_adapters._loaded.keys() == {"style"}
        assert (drawn(denoiser, denoiser.prepare(params())) == expected).all()
        return str(error.value)

    of_one = "double_blocks.1.processor.ip_adapter_double_stream_v_proj"
    assert "its ip_adapter.1.to_v_ip.bias is not there" in refused("short", f"{of_one}.bias")
    wide = torch.ones((32, 7))
    assert "its ip_adapter.1.to_v_ip.weight is 32x7" in refused("wide", **{f"{of_one}.weight": wide})
    further = {"double_blocks.2.processor.ip_adapter_double_stream_k_proj.bias": torch.ones(32)}
    assert "its ip_adapter.2.to_k_ip.bias is 32, and the model's not there" in refused("long", **further)
    nan = {f"{of_one}.bias": torch.full((32,), torch.nan)}
    assert f"its {of_one}.bias is float32, or not finite" in refused("nan", **nan)
    single = {"single_blocks.0.processor.x": torch.ones(2)}
    assert "its single_blocks.0.processor.x is of no IP-Adapter" in refused("single", **single)
    assert "its image_proj.norm.bias is not there" in refused("half", "ip_adapter_proj_model.norm.bias")
    queries = {"ip_adapter_proj_model.latents": torch.ones((1, 2))}
    assert "its image_proj.latents is 1x2, as no projection" in refused("queries", **queries)
    flat = {"ip_adapter_proj_model.proj.weight": torch.ones(())}
    assert "its image_proj.proj.weight is one number, as no" in refused("flat", **flat)
    norms = {f"ip_adapter_proj_model.norm.{kind}": torch.ones(7) for kind in ("weight", "bias")}
    narrow = {"proj.weight": torch.ones((28, 8)), "proj.bias": torch.ones(28)}
    narrow = {**norms, **{f"ip_adapter_proj_model.{name}": tensor for name, tensor in narrow.items()}}
    assert "its image_proj gives tokens of 7, and the model's have" in refused("narrow", **narrow)


def test_those_of_unets_are_refused_by_name(folder: Path) -> None:
    with pytest.raises(UnusableIPAdapter, match=r"its ip_adapter\..* is .*, and the model's"):
        denoiser_of(tiny_sdxl(), folder, ["style"])


@pytest.mark.parametrize("make", [tiny_flux_schnell, tiny_kontext])
def test_other_models_of_flux_draw_with_them_as_diffusers_has_it(
    make: Callable[[], Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    denoiser = denoiser_of(make(), folder, ["style", "face"])
    fields: dict[str, Any] = {}
    given: dict[str, Any] = {"max_sequence_length": 256}  # as schnell was trained
    if make is tiny_kontext:
        fields = {"references": ({"image": EDGES},)}
        given = {"image": EDGES, "max_area": 128 * 64}
    theirs = by_diffusers(make(), BOTH, **given)
    assert np.abs(drawn(denoiser, denoiser.prepare(params(*BOTH, **fields))) - theirs).max() <= 1
    plain = drawn(denoiser, denoiser.prepare(params(**fields)))
    assert np.abs(plain - theirs).max() > 10


@pytest.mark.parametrize("make", [tiny_flux, tiny_flux_fill, tiny_kontext, tiny_sd3, tiny_sdxl])
def test_what_a_model_says_that_it_lacks_is_what_it_refuses(make: Callable[[], Any]) -> None:
    denoiser = Denoiser(make())
    steps = PIPELINES[denoiser.family].steps
    lacks = PIPELINES[denoiser.family].terms(configs_of(make())).lacks
    assert ("ip_adapters" in lacks) == (steps.prompted is None)


def _with_others(communicator: Communicator, folder: Path, asked: Any) -> np.ndarray:
    gang = connect("local") if communicator.world_size == 1 else communicator
    pipeline = parallelize(tiny_flux(), gang, ParallelConfig(exchange="sync"))
    denoiser = denoiser_of(pipeline, folder, ["style", "face"])
    denoiser.controls.load(ControlNetSpec(name="canny", source=str(folder / "canny")))
    denoiser.adapters.learn([AdapterSpec(name="ink", source=str(folder / "ink.safetensors"))])
    drawn(denoiser, denoiser.prepare(params(*ONE, prompt="before")))  # so that the adapter comes beside it
    return drawn(denoiser, denoiser.prepare(asked))


def test_loras_and_control_beside_are_what_diffusers_draws(folder: Path) -> None:
    tiny_flux_controlnet(5).save_pretrained(folder / "canny")
    generator = torch.Generator().manual_seed(8)
    layer = "transformer_blocks.1.attn.to_k"
    width = tiny_flux().transformer.get_submodule(layer).in_features
    factors = {
        f"transformer.{layer}.lora_A.weight": torch.randn((2, width), generator=generator),
        f"transformer.{layer}.lora_B.weight": torch.randn((width, 2), generator=generator),
    }
    save_file(factors, folder / "ink.safetensors")
    components = {**tiny_flux().components, "controlnet": tiny_flux_controlnet(5)}
    pipeline = FluxControlNetPipeline(**components)
    pipeline.load_lora_weights(factors)
    given = {"control_image": EDGES, "controlnet_conditioning_scale": 0.7}
    theirs = by_diffusers(pipeline, BOTH, **given, guidance_scale=3.5)
    asked = params(
        *BOTH,
        control=(Control(name="canny", image=EDGES, scale=0.7),),
        loras=[{"name": "ink"}],
    )
    for size in (1, 2):
        for image in run_in_lockstep(size, partial(_with_others, folder=folder, asked=asked)):
            assert np.abs(image - theirs).max() <= 1
    for left_out in ({"control": ()}, {"loras": ()}, {"ip_adapters": ()}):
        (image,) = run_in_lockstep(
            1, partial(_with_others, folder=folder, asked=asked.model_copy(update=left_out))
        )
        assert np.abs(image - theirs).max() > 1
