"""Weights that leave the device, and weights that do not fit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from distriray.denoise import Denoiser
from distriray.errors import UnsupportedModel
from distriray.models import ModelSpec, load_pipeline
from distriray.requests import SamplingParams
from distriray.weights import check_fit
from tests.edits import shown, shrink
from tests.models import save
from tests.parameters import sweep
from tests.save_model import MODELS

REQUEST: dict[str, Any] = {
    "seed": 1,
    "height": 64,
    "width": 64,
    "num_inference_steps": 2,
}


@pytest.mark.parametrize("name", sweep(sorted(MODELS)))
def test_text_encoders_that_stay_on_the_host_draw_the_same_pictures(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    save(MODELS[name](), tmp_path)
    latents = []
    for offload_text in (False, True):
        pipeline = load_pipeline(ModelSpec(name=str(tmp_path), offload_text=offload_text), "cpu")
        denoiser = Denoiser(pipeline)
        for prompt in ("a lake", "fog"):  # the weights come more than once
            unguided = denoiser.terms.unguided
            request = shown(denoiser, **REQUEST, prompt=prompt, guidance_scale=unguided)
            state = denoiser.prepare(SamplingParams(**request))
            denoiser.step(state)
        latents.append(state.latents)
        for part, network in pipeline.components.items():
            if isinstance(network, torch.nn.Module):
                away = offload_text and part.startswith("text_encoder")
                assert all(weight.is_meta == away for weight in network.parameters()), part
    assert torch.equal(*latents)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it looks at Linux's memory maps")
def test_text_encoders_on_the_host_are_the_pages_of_their_files_which_processes_share(tmp_path: Path) -> None:
    save(MODELS["sdxl"](), tmp_path)
    pipeline = load_pipeline(ModelSpec(name=str(tmp_path)), "cpu")
    mapped = [
        range(*(int(end, 16) for end in each.addr.split("-")))
        for each in psutil.Process().memory_maps(grouped=False)
        if Path(each.path).is_relative_to(tmp_path)
    ]
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        for name, weight in encoder.named_parameters():
            assert any(weight.data_ptr() in pages for pages in mapped), name


def test_what_does_not_fit_is_refused_with_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, layers = torch.device("cuda", 0), {"transformer": torch.nn.Linear(1000, 1000, bias=False)}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4_000_000, 80_000_000))
    check_fit(layers, gpu)
    layers["vae"] = torch.nn.BatchNorm1d(1)
    with pytest.raises(
        UnsupportedModel, match=r"need 0.0 GB \(transformer 0.0, vae 0.0\) where cuda:0 has 0.0"
    ):
        check_fit(layers, gpu)
