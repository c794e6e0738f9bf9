"""Finding and loading a model: built in, in a local folder, or on the Hugging Face Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from distriray.errors import ModelNotFound, UnsupportedModel
from distriray.landscapes import MODELS

if TYPE_CHECKING:
    import torch

BUILTIN = "builtin:"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_BUILT_IN = ", ".join(BUILTIN + name for name in MODELS)
_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
_ONE_FILE = ".safetensors"
_INDEX, _MODULAR_INDEX = "model_index.json", "modular_model_index.json"
_MEND = "download the model again, or save it with save_pretrained"
_UNUSED = ("prompt_upsampler", "prompt_upsampler_processor", "pe", "pe_tokenizer")
"""What writes prompts anew for FLUX.3 and ERNIE-Image: here they are read as they are."""
_UNUSED_BY = {"LongCatImagePipeline": ("text_processor",)}
"""The same that another class's pipelines need: LongCat-Image-Edit's read pictures by it."""


class ModelSpec(BaseModel):
    """A model: which weights to load, and how; in configurations its name alone will do.

    Attributes:
        name: `builtin:landscapes`, a folder that a diffusers pipeline was saved to, a single `.safetensors`
            file with the weights of one, or a Hugging Face id.
        config: of a single file: folder or Hugging Face id of a pipeline whose configurations and tokenizers
            it is loaded with. None is the one that its weights look like.
        revision: branch, tag or commit of a Hugging Face model.
        variant: suffix of the weight files, such as `fp16`.
        dtype: of the weights in memory; `auto` is float32 on a CPU, and on a GPU bfloat16 for models that
            denoise with a transformer, float16 for others.
        quantize: to what the weights of the denoising network's linear layers are rounded, by torchao; None
            leaves them in `dtype`.
        offload_text: keep text encoders in the host's memory; their layers come to the device one by one to
            read a prompt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "builtin:landscapes"
    config: str | None = None
    revision: str | None = None
    variant: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    quantize: Literal["int8", "float8"] | None = None
    offload_text: bool = False

    @model_validator(mode="before")
    @classmethod
    def _of_name(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data


def locate(spec: ModelSpec) -> Path:
    """The local folder or single file of a model; from the Hugging Face Hub it is downloaded, if not cached.

    Only safetensors weights are taken, so nothing in a model is ever executed.

    Raises:
        ModelNotFound: saying what was looked for, and where.
    """
    name, local = spec.name, Path(spec.name).expanduser()
    if spec.revision is not None and (name.startswith(BUILTIN) or local.exists()):
        where = "is built in" if name.startswith(BUILTIN) else f"is {local.absolute()} here"
        raise ModelNotFound(
            f"no model {name!r} at revision {spec.revision!r}: it {where}, and has no revisions; leave it out"
        )
    if name.startswith(BUILTIN):
        folder = MODELS.get(name.removeprefix(BUILTIN))
        if folder is None:
            raise ModelNotFound(f"no built-in model {name!r}; there is {_BUILT_IN}")
        return _pipeline_folder(folder, name)
    if local.is_file():
        return _single_file(local, name)
    if local.exists():
        return _pipeline_folder(local, name)
    if local.suffix == _ONE_FILE:
        raise ModelNotFound(f"no model {name!r}: there is no file {local.absolute()}")
    if not is_hub_id(name):
        raise ModelNotFound(
            f"no model {name!r}: there is no folder {local.absolute()}, and it is not a Hugging Face id such "
            f"as stabilityai/stable-diffusion-xl-base-1.0; built in is {_BUILT_IN}"
        )
    # In the components' folders: beside them a repository often has the same weights again, in one file.
    weights = f"*/*.{spec.variant}.safetensors" if spec.variant else "*/*.safetensors"
    return _pipeline_folder(download(spec, local, (*_FILES, weights)), name)


def is_hub_id(name: str) -> bool:
    """Whether a name looks like a Hugging Face id, and not like a path from here."""
    return _HUB_ID.fullmatch(name) is not None and not name.startswith(("./", "../"))


def _single_file(file: Path, name: str) -> Path:
    if file.suffix != _ONE_FILE:
        raise ModelNotFound(
            f"no model {name!r}: {file.absolute()} is a file, and no {_ONE_FILE} one; others are not read, "
            "since they may run code"
        )
    return file


def _pipeline_folder(folder: Path, name: str) -> Path:
    if index_file(folder).is_file():
        return folder
    what = f"has no {_INDEX}" if any(folder.iterdir()) else f"is empty, without a {_INDEX}"
    raise ModelNotFound(
        f"no model {name!r}: {folder.absolute()} {what}; a pipeline saved with save_pretrained has one"
    )


def index_file(folder: Path) -> Path:
    """The file that says what pipeline a folder is of: of a modular one where there is no other."""
    index, modular = folder / _INDEX, folder / _MODULAR_INDEX
    return modular if modular.is_file() and not index.is_file() else index


def read_index(folder: Path) -> dict[str, Any]:
    """What a folder's index says of its pipeline: its class as `_class_name`, and its components by name.

    Raises:
        ModelNotFound: the file is damaged, or no pipeline's.
    """
    file = index_file(folder)
    index = read_values(file)
    if not isinstance(index.get("_class_name"), str):
        raise ModelNotFound(f"{file} names no pipeline's class as _class_name; {_MEND}")
    return index


def read_values(file: Path) -> dict[str, Any]:
    """What a file of a model's folder says of a pipeline or a component.

    Raises:
        ModelNotFound: it is damaged, or not there.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"{file} cannot be read: {error}; {_MEND}") from error
    if not isinstance(config, dict):
        raise ModelNotFound(f"{file} cannot be read: it has no names and values; {_MEND}")
    return config


def download(spec: ModelSpec, local: Path, files: Sequence[str]) -> Path:
    """The folder with those of a Hugging Face id's files, downloaded if not cached.

    Args:
        local: where it was looked for before, for the error.

    Raises:
        ModelNotFound: saying what was looked for, and where.
    """
    from httpx import HTTPError
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = f"{spec.name!r}" + (f" at revision {spec.revision!r}" if spec.revision else "")
    try:
        folder = snapshot_download(
            spec.name,
            revision=spec.revision,
            allow_patterns=list(files),
        )
    except HFValidationError as error:
        raise ModelNotFound(
            f"there is no folder {local.absolute()}, and {spec.name!r} is not a Hugging Face id"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        raise ModelNotFound(
            f"no model {wanted}: looked for the folder {local.absolute()}, in the cache "
            f"{constants.HF_HUB_CACHE} and at {constants.ENDPOINT}/{spec.name} "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]})"
        ) from error
    return Path(folder)


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
        ModelNotFound: no such model, its folder has a damaged index or lacks safetensors weights, or its file
            some that it needs.
        UnsupportedModel: it is to be quantized, and torchao is not installed, or it is a single file or a
            modular pipeline; or it does not fit into the device's memory.
    """
    import torch
    from diffusers import DiffusionPipeline

    device = torch.device(device)
    folder = locate(spec)
    if folder.is_file():
        if spec.quantize is not None:
            raise UnsupportedModel(f"quantize {spec.quantize!r} of a single file; save it as a folder first")
        return _placed(_load_file(spec, folder, device), spec, device)
    index, missing = _index_of(folder)
    dtype = resolve_dtype(spec, device, index)
    if index_file(folder).name == _MODULAR_INDEX:
        if spec.quantize is not None:
            raise UnsupportedModel(f"quantize {spec.quantize!r} of a modular pipeline, which was not tried")
        return _placed(_load_modular(spec, folder, dtype), spec, device)
    quantization = None if spec.quantize is None else _quantization(spec, index)
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            folder,
            variant=spec.variant,
            dtype=dtype,
            quantization_config=quantization,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **missing,  # diffusers insists on some, such as SD 3's T5, unless it is told
        )
    except (OSError, ValueError) as error:
        variant = f" of variant {spec.variant!r}" if spec.variant else ""
        raise ModelNotFound(f"{spec.name!r}: no safetensors weights{variant} in {folder}: {error}") from error
    return _placed(pipeline, spec, device)


def _load_modular(spec: ModelSpec, folder: Path, dtype: torch.dtype) -> Any:
    """The modular pipeline of a folder, with those of its components that lie there too."""
    from diffusers import ModularPipeline
    from torch import nn

    try:
        pipeline = ModularPipeline.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"{spec.name!r}: no pipeline of diffusers' own in {folder}: {error}") from error
    specs = {name: pipeline.get_component_spec(name) for name in pipeline.pretrained_component_names}
    here = [
        name
        for name, component in specs.items()
        if component.pretrained_model_name_or_path == str(folder) and name not in _UNUSED
    ]
    modules = [name for name in here if issubclass(specs[name].type_hint or nn.Module, nn.Module)]
    options: dict[str, Any] = {"use_safetensors": dict.fromkeys(modules, True)}
    if spec.variant is not None:
        options["variant"] = dict.fromkeys(modules, spec.variant)
    pipeline.load_components(here, dtype=dtype, local_files_only=True, **options)
    missing = [name for name in here if getattr(pipeline, name) is None]  # diffusers logs why
    if missing:
        variant = f" of variant {spec.variant!r}" if spec.variant else ""
        raise ModelNotFound(
            f"{spec.name!r}: {', '.join(missing)} in {folder} cannot be loaded, from safetensors "
            f"weights{variant} where it has any"
        )
    return pipeline


def _placed(pipeline: Any, spec: ModelSpec, device: torch.device) -> Any:
    from distriray.weights import place

    pipeline.set_progress_bar_config(disable=True)
    for name in pipeline.components.keys() & _unused_by(type(pipeline).__name__):
        setattr(pipeline, name, None)  # diffusers loads optional components whatever it is told
    return place(pipeline, device, offload_text=spec.offload_text)


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


def _index_of(folder: Path) -> tuple[dict[str, Any], dict[str, None]]:
    """The pipeline that a folder names, and the components that it says are missing, or that nobody asks."""
    index = read_index(folder)
    unused = _unused_by(index["_class_name"])
    return index, {name: None for name, home in index.items() if home == [None, None] or name in unused}


def _unused_by(class_name: str) -> set[str]:
    """The components that nobody asks of pipelines of that class."""
    return {*_UNUSED, *_UNUSED_BY.get(class_name, ())}


def _load_file(spec: ModelSpec, file: Path, device: torch.device) -> Any:
    """The pipeline whose weights are all in one file, as its authors' own code writes it."""
    import diffusers
    import torch
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    folder = _configurations(spec, file)
    index, missing = _index_of(folder)
    kind, dtype = index["_class_name"], resolve_dtype(spec, device, index)
    if not hasattr(getattr(diffusers, kind, None), "from_single_file"):
        raise ModelNotFound(f"{spec.name!r}: diffusers reads no {kind} from a single file")
    try:
        pipeline = getattr(diffusers, kind).from_single_file(
            str(file), config=str(folder), dtype=dtype, local_files_only=True, **missing
        )
    except (OSError, ValueError, KeyError, RuntimeError, SingleFileComponentError) as error:
        raise ModelNotFound(
            f"{spec.name!r} cannot be read as a {kind} with the configurations in {folder}: {error}; "
            "name others as the model's `config`"
        ) from error
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and any(each.is_meta for each in part.parameters()):
            raise ModelNotFound(f"{spec.name!r} lacks weights of the {name} that {folder} configures")
    return pipeline


def _configurations(spec: ModelSpec, file: Path) -> Path:
    """The folder of a pipeline's configurations for the weights in `file`; the Hub's, without its weights."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
    from safetensors import SafetensorError

    name = spec.config
    if name is None:
        try:
            weights = load_single_file_checkpoint(str(file), local_files_only=True)
        except (OSError, SafetensorError) as error:
            raise ModelNotFound(f"{spec.name!r} is no safetensors file: {error}") from error
        name = fetch_diffusers_config(weights)["pretrained_model_name_or_path"]
    if (local := Path(name).expanduser()).is_dir():
        return _pipeline_folder(local, name)
    return _pipeline_folder(download(ModelSpec(name=name), local, _FILES), name)
