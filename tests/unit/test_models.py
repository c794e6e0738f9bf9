"""A model is found where it is, or the message says where it was looked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from distriray.errors import ModelNotFound
from distriray.models import ModelSpec, load_pipeline, locate, resolve_dtype
from tests.models import tiny_sdxl


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("builtin:portraits", "there is builtin:landscapes"),
        ("./no/such/folder", "no such|there is no folder"),
        ("no-such-model", "is not a Hugging Face id"),
    ],
)
def test_a_missing_model_says_what_was_looked_for(name: str, says: str) -> None:
    with pytest.raises(ModelNotFound, match=says) as missing:
        locate(ModelSpec(name=name))
    assert name in str(missing.value)


def test_a_missing_hub_model_names_folder_cache_and_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound) as missing:
        locate(ModelSpec(name="nobody/nothing", revision="v2"))
    for part in ("nobody/nothing", "v2", str(tmp_path), constants.HF_HUB_CACHE, constants.ENDPOINT):
        assert part in str(missing.value)


@pytest.mark.parametrize(
    ("variant", "wanted"),
    [
        (None, ["model_index.json", "tokenizer/merges.txt", "unet/a.safetensors", "unet/a.fp16.safetensors"]),
        ("fp16", ["model_index.json", "tokenizer/merges.txt", "unet/a.fp16.safetensors"]),
    ],
)
def test_of_a_hub_model_only_the_components_weights_are_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variant: str | None, wanted: list[str]
) -> None:
    there = [*wanted, "unet/a.safetensors", "unet/a.bin", "v1-5-pruned.safetensors", "xl.fp16.safetensors"]
    taken: list[str] = []

    def snapshot_download(name: str, *, allow_patterns: list[str], **_: object) -> str:
        taken.extend(filter_repo_objects(there, allow_patterns=allow_patterns))
        (tmp_path / "model_index.json").touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert locate(ModelSpec(name="some/model", variant=variant)) == tmp_path
    assert sorted(set(taken)) == sorted(wanted)


def test_a_folder_without_a_pipeline_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"model_index\.json"):
        locate(ModelSpec(name=str(tmp_path)))


def test_weights_are_safetensors_or_nothing(tmp_path: Path) -> None:
    tiny_sdxl().save_pretrained(tmp_path)
    spec = ModelSpec(name=str(tmp_path))
    pipeline = load_pipeline(spec, "cpu")
    assert pipeline.unet.dtype == torch.float32
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(pipeline.unet.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ModelNotFound, match="safetensors"):
        load_pipeline(spec, "cpu")


def test_auto_dtype_is_half_precision_on_a_gpu_only() -> None:
    spec = ModelSpec()
    assert resolve_dtype(spec, torch.device("cpu")) is torch.float32
    assert resolve_dtype(spec, torch.device("cuda")) is torch.float16
    assert resolve_dtype(ModelSpec(dtype="bfloat16"), torch.device("cuda")) is torch.bfloat16


def test_a_service_knows_a_models_sizes_and_loads_neither_torch_nor_diffusers() -> None:
    code = (
        "import sys, deployments.router, deployments.ingress, deployments.http.app\n"
        "from deployments.models import sizes_of\n"
        "from distriray.models import ModelSpec\n"
        "sizes = sizes_of(ModelSpec())\n"
        "print(sizes.default, sizes.unit, [m for m in ('torch', 'diffusers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(512, 512) 8 []"


def test_importing_distriray_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, distriray; distriray.ParallelConfig, distriray.GenerationRequest, distriray.HostConfig\n"
        "import distriray.cli, distriray.models, distriray.routing.policies.elastic\n"
        "print([m for m in ('torch', 'ray', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
