"""Finding and loading a model: built in, in a local folder, or on the Hugging Face Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from .errors import ModelNotFound, UnsupportedModel

if TYPE_CHECKING:
    import torch

BUILTIN = "builtin:"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ("*.json", "*.txt", "*.model")


class ModelSpec(BaseModel):
    """Which weights to load, and how.

    Attributes:
        name: `builtin:landscapes`, a folder that a diffusers pipeline was saved to, or a Hugging Face id.
        revision: branch, tag or commit of a Hugging Face model.
        variant: suffix of the weight files, such as `fp16`.
        dtype: of the weights in memory; `auto` is float32 on a CPU, and on a GPU bfloat16 for models that
            denoise with a transformer, float16 for others.
        quantize: to what the weights of the denoising network's linear layers are rounded, by torchao; None
            leaves them in `dtype`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "builtin:landscapes"
    revision: str | None = None
    variant: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    quantize: Literal["int8", "float8"] | None = None


def builtin_models() -> dict[str, Path]:
    """The models that come with distriray, by the name after `builtin:`."""
    from .landscapes import MODEL_DIR

    return {"landscapes": MODEL_DIR}


def locate(spec: ModelSpec) -> Path:
    """The local folder of a model; one from the Hugging Face Hub is downloaded first, if it is not cached.

    Only safetensors weights are taken, so nothing in a model is ever executed.

    Raises:
        ModelNotFound: saying what was looked for, and where.
    """
    name = spec.name
    if name.startswith(BUILTIN):
        known = builtin_models()
        folder = known.get(name.removeprefix(BUILTIN))
        if folder is None:
            raise ModelNotFound(
                f"no built-in model {name!r}; there is {', '.join(BUILTIN + k for k in known)}"
            )
        return _pipeline_folder(folder, name)
    local = Path(name).expanduser()
    if local.exists():
        return _pipeline_folder(local, name)
    if not _HUB_ID.fullmatch(name) or name.startswith(("./", "../")):
        raise ModelNotFound(
            f"no model {name!r}: there is no folder {local.absolute()}, and it is not a Hugging Face id such "
            "as stabilityai/stable-diffusion-xl-base-1.0; the built-in model is builtin:landscapes"
        )
    return _from_hub(spec, local)


def _pipeline_folder(folder: Path, name: str) -> Path:
    if (folder / "model_index.json").is_file():
        return folder
    what = "is empty or missing" if not folder.is_dir() else "has no model_index.json"
    raise ModelNotFound(
        f"no model {name!r}: {folder.absolute()} {what}; a pipeline saved with save_pretrained has one"
    )


def _from_hub(spec: ModelSpec, local: Path) -> Path:
    from httpx import HTTPError
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    suffix = f".{spec.variant}" if spec.variant else ""
    # In the components' folders: beside them a repository often has the same weights again, in one file.
    weights = f"*/*{suffix}.safetensors"
    wanted = f"{spec.name!r}" + (f" at revision {spec.revision!r}" if spec.revision else "")
    try:
        folder = snapshot_download(
            spec.name,
            revision=spec.revision,
            allow_patterns=[*_FILES, weights],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        raise ModelNotFound(
            f"no model {wanted}: looked for the folder {local.absolute()}, in the cache "
            f"{constants.HF_HUB_CACHE} and at {constants.ENDPOINT}/{spec.name} "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]})"
        ) from error
    return _pipeline_folder(Path(folder), spec.name)


def resolve_dtype(spec: ModelSpec, device: torch.device, components: Collection[str] = ()) -> torch.dtype:
    """The dtype that `spec` means on `device` for a pipeline of these components."""
    import torch

    if spec.dtype == "auto":
        half = torch.bfloat16 if "transformer" in components else torch.float16
        return torch.float32 if device.type == "cpu" else half
    dtype = getattr(torch, spec.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def load_pipeline(spec: ModelSpec, device: torch.device | str) -> Any:
    """The diffusers pipeline of `spec` on `device`, in evaluation mode and without a progress bar.

    Raises:
        ModelNotFound: no such model, or its folder lacks safetensors weights.
        UnsupportedModel: it is to be quantized, and torchao is not installed.
    """
    import torch
    from diffusers import DiffusionPipeline

    device = torch.device(device)
    folder = locate(spec)
    index = json.loads((folder / "model_index.json").read_text())
    missing = {name: None for name, home in index.items() if home == [None, None]}
    quantization = None if spec.quantize is None else _quantization(spec, index)
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            folder,
            variant=spec.variant,
            dtype=resolve_dtype(spec, device, index),
            quantization_config=quantization,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **missing,  # diffusers insists on some, such as SD 3's T5, unless it is told
        )
    except (OSError, ValueError) as error:
        variant = f" of variant {spec.variant!r}" if spec.variant else ""
        raise ModelNotFound(f"{spec.name!r}: no safetensors weights{variant} in {folder}: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _quantization(spec: ModelSpec, components: Collection[str]) -> Any:
    """diffusers' configuration for the network among a pipeline's components; raises UnsupportedModel."""
    from diffusers import PipelineQuantizationConfig, TorchAoConfig

    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
    except ImportError as error:
        raise UnsupportedModel(
            f"quantize {spec.quantize!r} needs torchao: pip install 'distriray[quantize]'"
        ) from error
    kind = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[spec.quantize or ""]
    network = "transformer" if "transformer" in components else "unet"
    return PipelineQuantizationConfig(quant_mapping={network: TorchAoConfig(kind())})
