"""Text encoders in the host's memory: the same pictures, and the device holds none of their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distriray.denoise import Denoiser
from distriray.models import ModelSpec, load_pipeline
from distriray.requests import SamplingParams
from tests.parameters import sweep
from tests.save_model import MODELS

REQUEST: dict[str, Any] = {
    "prompt": "a lake",
    "seed": 1,
    "height": 64,
    "width": 64,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
}


@pytest.mark.parametrize("name", sweep(sorted(MODELS)))
def test_pictures_are_the_same_and_weights_stay_on_the_host(name: str, tmp_path: Path) -> None:
    MODELS[name]().save_pretrained(tmp_path)
    latents = []
    for offload_text in (False, True):
        pipeline = load_pipeline(ModelSpec(name=str(tmp_path), offload_text=offload_text), "cpu")
        denoiser = Denoiser(pipeline)
        for prompt in ("a lake", "fog"):  # the weights come more than once
            state = denoiser.prepare(SamplingParams(**{**REQUEST, "prompt": prompt}))
            denoiser.step(state)
        latents.append(state.latents)
        for part, network in pipeline.components.items():
            if isinstance(network, torch.nn.Module):
                away = offload_text and part.startswith("text_encoder")
                assert all(weight.is_meta == away for weight in network.parameters()), part
    assert torch.equal(*latents)
