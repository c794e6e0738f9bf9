"""Models from folders: what runners and the command line draw with them, and how they are loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from deployments.models import sizes_of, terms_of
from distriray.denoise import Denoiser
from distriray.errors import InvalidRequest
from distriray.gang.messages import SegmentEnd
from distriray.models import ModelSpec, load_pipeline
from tests.edits import shown
from tests.likeness import apart
from tests.models import save
from tests.unit.flow_matching.families import MODELS
from tests.unit.flow_matching.gangs import TALL
from tests.unit.flow_matching.ordinary import plain
from tests.unit.gang.runners import Gang


@pytest.fixture(scope="module")
def folder(model: str, pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / model
    save(pipeline, folder)
    return folder


def test_a_gang_of_runners_draws_the_picture_of_the_pipeline(
    pipeline: Any, denoiser: Denoiser, folder: Path
) -> None:
    gang = Gang(folder, 2)
    facts, sizes = gang.runners[0].facts(), sizes_of(ModelSpec(name=str(folder)))
    assert sizes == denoiser.sizes
    assert (facts.default_size, facts.size_unit, facts.row_unit) == (sizes.default, sizes.unit, 16)
    assert facts.terms == terms_of(ModelSpec(name=str(folder))) == denoiser.terms
    assert facts.cuts_vae
    call = {"num_inference_steps": 3}
    asked = shown(denoiser, **call)
    outcome, _ = gang.run(seed=3, **asked)
    (picture,) = outcome.images or ()
    size = {"height": picture.height, "width": picture.width}
    (expected,) = plain(pipeline, [3], output_type="pil", **call, **size)
    assert apart(picture, expected) <= 1
    refused, _ = gang.run(seed=3, **{**asked, "scheduler": "ddim"})
    assert refused.end is SegmentEnd.REFUSED and isinstance(refused.error, InvalidRequest)


@pytest.mark.ray
@pytest.mark.parametrize(
    "model",
    [
        "flux-dev",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "chroma",
                "ernie-image",
                "flux2-klein",
                "flux3",
                "hunyuan-image",
                "qwen-image",
                "qwen-image-2.1",
                "sd3",
                "z-image",
            )
        ),
    ],
)
def test_the_command_line_draws_a_saved_model_with_two_workers(model: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "lake.png"
    save = [sys.executable, "-m", "tests.save_model", model, str(folder)]
    subprocess.run(save, check=True, capture_output=True, text=True, timeout=120)
    options = {"model": folder, "out": out, "gang-size": 2, "exchange": "sync", "seed": 3,
               "height": 160, "width": 64, "num-inference-steps": 4, "cpus": 2}  # fmt: skip
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    command = [sys.executable, "-m", "distriray", "generate", "a lake", *flags]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    (expected,) = plain(MODELS[model](), [3], output_type="pil", **{**TALL, "num_inference_steps": 4})
    assert apart(Image.open(out), expected) <= 1


def test_a_folder_without_t5_is_loaded_and_its_dtype_on_a_gpu_is_bfloat16(
    monkeypatch: pytest.MonkeyPatch, sd3: Any, tmp_path: Path
) -> None:
    """diffusers by itself refuses such a folder."""
    sd3.save_pretrained(tmp_path)
    spec = ModelSpec(name=str(tmp_path))
    loaded = load_pipeline(spec, "cpu")
    assert loaded.text_encoder_3 is None and loaded.transformer.dtype is torch.float32
    kinds: list[torch.dtype] = []
    load = DiffusionPipeline.from_pretrained

    def loads(*args: Any, dtype: torch.dtype, **options: Any) -> Any:
        kinds.append(dtype)
        return load(*args, dtype=dtype, **options)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", loads)
    monkeypatch.setattr(DiffusionPipeline, "to", lambda pipeline, device: pipeline)
    monkeypatch.setattr("distriray.weights.check_fit", lambda modules, device: None)
    half = load_pipeline(spec, "cuda")
    assert kinds == [torch.bfloat16] and half.transformer.dtype is torch.bfloat16
