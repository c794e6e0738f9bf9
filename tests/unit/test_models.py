"""A model is found where it is, or the message says where it was looked for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from deployments.models import sizes_of, terms_of
from distriray.denoise import Denoiser
from distriray.denoise.pipelines.sizes import configs_in
from distriray.errors import ModelNotFound, UnsupportedModel
from distriray.models import ModelSpec, load_pipeline, locate, resolve_dtype
from tests.models import (
    save,
    tiny_ernie_image,
    tiny_flux3,
    tiny_longcat_image,
    tiny_longcat_image_edit,
    tiny_sd15,
    tiny_sdxl,
)
from tests.unit.single_file import single_file


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


@pytest.mark.parametrize("name", ["builtin:landscapes", "some/model"])
def test_a_revision_of_what_is_not_on_the_hub_is_not_taken_for_what_is_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("some/model").mkdir(parents=True)
    with pytest.raises(ModelNotFound, match=f"no model '{name}' at revision 'v2': it is .* has no revisions"):
        locate(ModelSpec(name=name, revision="v2"))


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


FILES = ["model_index.json", "tokenizer/merges.txt", "tokenizer/chat_template.jinja"]


@pytest.mark.parametrize(
    ("variant", "wanted"),
    [
        (None, [*FILES, "unet/a.safetensors", "unet/a.fp16.safetensors"]),
        ("fp16", [*FILES, "unet/a.fp16.safetensors"]),
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


@pytest.mark.parametrize("name", ["model_index.json", "modular_model_index.json"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"_class_name": "Flux', "cannot be read: "),
        (b"\xff\xfe", "cannot be read: "),
        (b"version https://git-lfs.github.com/spec/v1", "cannot be read: "),
        (b"[]", "cannot be read: it has no names and values"),
        (b'{"vae": ["diffusers", "AutoencoderKL"]}', "names no pipeline's class as _class_name"),
    ],
)
def test_a_folder_whose_index_is_damaged_is_no_model(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    spec = ModelSpec(name=str(tmp_path))
    with pytest.raises(ModelNotFound, match=f"{name} {says}.*; download the model again"):
        load_pipeline(spec, "cpu")
    assert sizes_of(spec) is None and terms_of(spec) is None


@pytest.mark.parametrize("content", [None, b'{"sample_size": ', b"[]"])
def test_of_a_folder_with_a_damaged_part_nothing_is_known_before_a_host_says_so(
    tmp_path: Path, content: bytes | None
) -> None:
    """A router would end with it, and all that it serves."""
    tiny_sdxl().save_pretrained(tmp_path)
    spec, config = ModelSpec(name=str(tmp_path)), tmp_path / "unet" / "config.json"
    assert sizes_of(spec) is not None and terms_of(spec) is not None
    if content is None:
        config.unlink()
    else:
        config.write_bytes(content)
    assert sizes_of(spec) is None and terms_of(spec) is None
    with pytest.raises(ModelNotFound, match="unet/config.json cannot be read: .*; download the model again"):
        configs_in(tmp_path)("unet")


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


def test_what_writes_prompts_anew_is_not_kept(tmp_path: Path) -> None:
    pipeline = tiny_ernie_image()
    pipeline.register_modules(pe=pipeline.text_encoder, pe_tokenizer=pipeline.tokenizer)
    save(pipeline, tmp_path)
    spec = ModelSpec(name=str(tmp_path))
    loaded = load_pipeline(spec, "cpu")
    assert loaded.pe is None and loaded.pe_tokenizer is None and loaded.text_encoder is not None
    assert sizes_of(spec) == Denoiser(loaded).sizes and terms_of(spec) == Denoiser(loaded).terms


def test_what_would_write_prompts_anew_needs_nothing_that_reading_them_does_not(tmp_path: Path) -> None:
    """LongCat-Image's processor of pictures and texts is not even read: it wants torchvision."""
    pipeline = tiny_longcat_image()
    pipeline.register_modules(text_processor=pipeline.tokenizer)
    save(pipeline, tmp_path)
    shutil.rmtree(tmp_path / "text_processor")
    loaded = load_pipeline(ModelSpec(name=str(tmp_path)), "cpu")
    assert loaded.text_processor is None and Denoiser(loaded).family == "LongCatImage"


def test_what_reads_pictures_for_the_longcat_that_edits_is_kept(tmp_path: Path) -> None:
    save(tiny_longcat_image_edit(), tmp_path)
    spec = ModelSpec(name=str(tmp_path))
    loaded = load_pipeline(spec, "cpu")
    assert loaded.text_processor is not None and Denoiser(loaded).family == "LongCatImageEdit"
    assert sizes_of(spec) == Denoiser(loaded).sizes and terms_of(spec) == Denoiser(loaded).terms


@pytest.fixture
def modular(tmp_path: Path) -> Path:
    """The folder of a modular pipeline, which is not where it was saved."""
    save(tiny_flux3(), tmp_path / "before")
    return (tmp_path / "before").rename(tmp_path / "after")


def test_a_modular_folder_is_loaded_from_where_it_is_and_without_what_reads_no_prompt(modular: Path) -> None:
    index = json.loads((modular / "modular_model_index.json").read_text())
    shutil.copytree(modular / "text_encoder", modular / "prompt_upsampler")
    library, kind, place = index["text_encoder"]
    index["prompt_upsampler"] = library, kind, {**place, "subfolder": "prompt_upsampler"}
    (modular / "modular_model_index.json").write_text(json.dumps(index))
    spec = ModelSpec(name=str(modular), dtype="bfloat16")
    pipeline, saved = load_pipeline(spec, "cpu"), tiny_flux3().to(torch.bfloat16)
    assert type(pipeline) is type(saved) and pipeline.prompt_upsampler is None
    for name in ("transformer", "vae", "text_encoder"):
        own, read = getattr(saved, name).state_dict(), getattr(pipeline, name).state_dict()
        assert own.keys() == read.keys()
        assert all(torch.equal(own[key].float(), read[key].bfloat16().float()) for key in own), name
    assert sizes_of(spec) == Denoiser(pipeline).sizes and terms_of(spec) == Denoiser(pipeline).terms


def test_a_part_of_a_modular_folder_without_safetensors_weights_is_named(modular: Path) -> None:
    weights = modular / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(
        load_pipeline(ModelSpec(name=str(modular)), "cpu").vae.state_dict(), weights.with_suffix(".bin")
    )
    weights.unlink()
    with pytest.raises(ModelNotFound, match=r": vae in .*after cannot be loaded, from safetensors"):
        load_pipeline(ModelSpec(name=str(modular)), "cpu")
    with pytest.raises(ModelNotFound, match="transformer.* weights of variant 'fp16'"):
        load_pipeline(ModelSpec(name=str(modular), variant="fp16"), "cpu")


def test_a_modular_folder_with_a_variant_or_with_code_of_its_own(modular: Path) -> None:
    tiny_flux3().save_pretrained(str(modular), variant="fp16", overwrite_modular_index=True)
    for weights in modular.glob("*/*.safetensors"):
        if "fp16" not in weights.name:
            weights.unlink()
    assert load_pipeline(ModelSpec(name=str(modular), variant="fp16"), "cpu").transformer is not None
    with pytest.raises(UnsupportedModel, match="quantize 'int8' of a modular pipeline"):
        load_pipeline(ModelSpec(name=str(modular), variant="fp16", quantize="int8"), "cpu")
    code = {"auto_map": {"ModularPipelineBlocks": "block.Blocks"}}
    (modular / "modular_config.json").write_text(json.dumps(code))
    (modular / "block.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(ModelNotFound, match="no pipeline of diffusers' own"):
        load_pipeline(ModelSpec(name=str(modular), variant="fp16"), "cpu")


@pytest.fixture(scope="module")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """A tiny pipeline, a folder of its configurations, and one file of its weights."""
    pipeline, folder = tiny_sd15(), tmp_path_factory.mktemp("configurations")
    pipeline.save_pretrained(folder)
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()
    file = tmp_path_factory.mktemp("file") / "tiny.safetensors"
    save_file(single_file(pipeline), file)
    return pipeline, folder, file


def test_a_single_file_is_the_pipeline_whose_weights_it_has(one_file: tuple[Any, Path, Path]) -> None:
    pipeline, folder, file = one_file
    loaded = load_pipeline(ModelSpec(name=str(file), config=str(folder)), "cpu")
    for name in ("unet", "vae", "text_encoder"):
        own = getattr(pipeline, name).state_dict()
        read = getattr(loaded, name).state_dict()
        assert own.keys() == read.keys() and all(torch.equal(own[key], read[key]) for key in own), name
    call = {"prompt": "a lake", "num_inference_steps": 2, "output_type": "latent", "height": 64, "width": 64}
    drawn = [p(generator=torch.Generator().manual_seed(1), **call).images for p in (pipeline, loaded)]
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)
    half = load_pipeline(ModelSpec(name=str(file), config=str(folder), dtype="bfloat16"), "cpu")
    assert half.unet.dtype == half.vae.dtype == half.text_encoder.dtype == torch.bfloat16
    assert Denoiser(loaded).family == "StableDiffusion"


def test_the_configurations_of_a_single_file_are_those_that_its_weights_look_like(
    one_file: tuple[Any, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub is a stub: it is asked for the configurations alone."""
    _, folder, file = one_file
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(name: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    load_pipeline(ModelSpec(name=str(file)), "cpu")
    load_pipeline(ModelSpec(name=str(file), config="some/other"), "cpu")
    assert [name for name, _ in asked] == ["stable-diffusion-v1-5/stable-diffusion-v1-5", "some/other"]
    assert not any("safetensors" in pattern for _, patterns in asked for pattern in patterns)


def test_a_file_that_is_no_model_says_what_it_is(one_file: tuple[Any, Path, Path], tmp_path: Path) -> None:
    _, folder, file = one_file

    def refusal(path: Path, config: Path | None = folder) -> str:
        spec = ModelSpec(name=str(path), config=None if config is None else str(config))
        with pytest.raises(ModelNotFound) as refused:
            load_pipeline(spec, "cpu")
        assert str(path) in str(refused.value)
        return str(refused.value)

    (tmp_path / "x.ckpt").write_bytes(b"anything")
    assert "is a file, and no .safetensors one" in refusal(tmp_path / "x.ckpt")
    assert "there is no file" in refusal(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"anything")
    assert "is no safetensors file" in refusal(tmp_path / "bad.safetensors", None)
    assert "cannot be read as a StableDiffusionPipeline" in refusal(tmp_path / "bad.safetensors")
    weights = load_file(file)
    lacking = {name: w for name, w in weights.items() if "decoder.conv_out" not in name}
    save_file(lacking, tmp_path / "part.safetensors")
    assert "cannot be read" in refusal(tmp_path / "part.safetensors")
    lacking = {name: w for name, w in weights.items() if "text_model.final_layer_norm" not in name}
    save_file(lacking, tmp_path / "less.safetensors")
    assert "lacks weights of the text_encoder" in refusal(tmp_path / "less.safetensors")
    lacking = {name: w for name, w in weights.items() if not name.startswith("cond_stage")}
    save_file(lacking, tmp_path / "lora.safetensors")
    assert "cannot be read" in refusal(tmp_path / "lora.safetensors")
    (tmp_path / "empty").mkdir()
    assert "is empty" in refusal(tmp_path / "empty")
    assert "no model_index.json" in refusal(tmp_path)
    with pytest.raises(UnsupportedModel, match="quantize 'int8' of a single file"):
        load_pipeline(ModelSpec(name=str(file), config=str(folder), quantize="int8"), "cpu")
    with pytest.raises(ModelNotFound, match="there is no file .*model.safetensors"):
        locate(ModelSpec(name="some/model.safetensors"))


def test_auto_dtype_is_half_precision_on_a_gpu_only() -> None:
    spec = ModelSpec()
    assert resolve_dtype(spec, torch.device("cpu")) is torch.float32
    assert resolve_dtype(spec, torch.device("cuda")) is torch.float16
    assert resolve_dtype(ModelSpec(dtype="bfloat16"), torch.device("cuda")) is torch.bfloat16


def test_a_service_knows_a_models_sizes_and_terms_and_loads_neither_torch_nor_diffusers() -> None:
    code = (
        "import sys, deployments.router, deployments.ingress, deployments.http.app\n"
        "from deployments.models import sizes_of, terms_of\n"
        "from distriray.models import ModelSpec\n"
        "sizes, terms = sizes_of(ModelSpec()), terms_of(ModelSpec())\n"
        "print(sizes.default, sizes.unit, *terms.lacks)\n"
        "print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(512, 512) 8 prompt_3 negative_prompt_3 references\n[]"


def test_importing_distriray_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, distriray; distriray.ParallelConfig, distriray.GenerationRequest, distriray.HostConfig\n"
        "import distriray.cli, distriray.models, distriray.routing.policies.elastic\n"
        "print([m for m in ('torch', 'ray', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
