"""A LoRA file: read, and checked against the pipeline that it is for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from distriray.denoise.adapter_origins import converted
from distriray.denoise.adapter_scales import alphas_said, scales_of
from distriray.denoise.weight_files import first_lines
from distriray.errors import UnusableAdapter

T = TypeVar("T")

_FACTORS = "lora_A", "lora_B"
_OTHER_KINDS = {"dora": "DoRA", ".hada_": "LoHa", ".lokr_": "LoKr"}
"""What is no LoRA, by a part of the names of its weights."""


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """The weights of a file that fits its pipeline, as diffusers loads them.

    Attributes:
        mark: of the file as it was read (`mark_of`).
        digest: of its content.
        weights: by names that begin with the part of the pipeline that they are for.
        scales: what diffusers is told of how much they count (`scales_of`).
        factors: PEFT's names of the weights, by part.
        nbytes: in memory, in the dtypes of the parts.
    """

    mark: tuple[str, int, int]
    digest: str
    weights: dict[str, Tensor]
    scales: dict[str, Any]
    factors: Mapping[str, frozenset[str]]
    nbytes: int

    @classmethod
    def read(cls, name: str, path: Path, pipeline: Any, most_bytes: int) -> Self:
        """The file of the adapter `name`.

        Args:
            pipeline: of diffusers; nothing is loaded into it.
            most_bytes: that are there for adapters; a file four times as large is not read.

        Raises:
            UnusableAdapter: it is missing, damaged or too large, or a weight does not fit the pipeline.
        """
        what = f"adapter {name!r}"
        try:
            mark = mark_of(path)
            if mark[1] > 4 * most_bytes:
                raise UnusableAdapter(
                    f"{what}: {path} has {mark[1]} bytes, and {most_bytes} are there for adapters "
                    "(lora_cache_bytes)"
                )
            content = path.read_bytes()
            tensors, metadata = dict(sorted(load(content).items())), _metadata(content)
        except (OSError, SafetensorError, ValueError) as error:
            if isinstance(error, UnusableAdapter):
                raise
            raise UnusableAdapter(f"{what}: {path} cannot be read: {first_lines(error, 1)}") from error
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        try:
            return cls._fitting(mark, digest, pipeline, tensors, metadata)
        except Exception as error:
            raise UnusableAdapter(f"{what} does not fit the model: {first_lines(error)}") from error

    @classmethod
    def _fitting(
        cls,
        mark: tuple[str, int, int],
        digest: str,
        pipeline: Any,
        tensors: dict[str, Tensor],
        metadata: dict[str, Any] | None,
    ) -> Self:
        """With weights in diffusers' form; raises ValueError, naming what does not fit."""
        tensors = {  # an alpha may be a whole number, as diffusers' `convert_state_dict_to_kohya` writes them
            name: tensor.float() if name.endswith(".alpha") and not tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }
        for name, tensor in tensors.items():
            if kind := next((kind for part, kind in _OTHER_KINDS.items() if part in name), None):
                raise ValueError(f"{name} is of a {kind}, which is not read")
            if not tensor.is_floating_point():
                raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, and no float")
            if not bool(torch.isfinite(tensor.float()).all()):
                raise ValueError(f"{name} holds infinities or NaN")
        if not hasattr(pipeline, "lora_state_dict"):
            raise ValueError(f"diffusers' {type(pipeline).__name__} reads no LoRA")
        components = parts_of(pipeline)
        weights, alphas = converted(pipeline, tensors)
        said = None if alphas else metadata
        factors, nbytes, left, scales = {}, 0, dict(weights), dict[str, Any]()
        for part, component in components.items():
            own = {name: left.pop(name) for name in weights if name.startswith(f"{part}.")}
            if not own:
                continue
            if any(weight.is_meta for weight in component.parameters()):
                raise ValueError(f"it changes the {part}, which offload_text keeps in the host's memory")
            own = {name.removeprefix(f"{part}."): tensor for name, tensor in own.items()}
            names = _as_peft({name: name for name in own}, component, text=part.startswith("text_encoder"))
            own = {name: own[theirs] for name, theirs in names.items()}
            _check_shapes(own, part, component)
            factors[part] = frozenset(own)
            ranks = _ranks(own)
            if said is None:
                scales |= scales_of(part, ranks, _alphas_of(names, part, alphas))
            else:
                scales |= scales_of(part, ranks, *alphas_said(said, part, ranks))
            nbytes += sum(tensor.numel() for tensor in own.values()) * component.dtype.itemsize
        if left:
            raise ValueError(f"{next(iter(left))} is for no part of it; it has {', '.join(components)}")
        if not factors:
            raise ValueError("it has no weights")
        if alphas:
            raise ValueError(f"{next(iter(alphas))} is of no layer that it has weights for")
        return cls(mark, digest, weights, scales, factors, nbytes)


def mark_of(path: Path) -> tuple[str, int, int]:
    """A mark that changes when a file is written again: path, bytes and time; raises OSError."""
    facts = os.stat(path)
    return str(path), facts.st_size, facts.st_mtime_ns


def parts_of(pipeline: Any) -> dict[str, Any]:
    """The parts of a pipeline that adapters may be of."""
    parts = getattr(pipeline, "_lora_loadable_modules", ())
    found = {part: getattr(pipeline, part, None) for part in parts}
    return {part: component for part, component in found.items() if component is not None}


def _metadata(content: bytes) -> dict[str, Any] | None:
    """Loading instructions that diffusers wrote into a safetensors file; raises ValueError."""
    length = int.from_bytes(content[:8], "little")
    about = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    written = about.get(LORA_ADAPTER_METADATA_KEY)
    try:
        metadata = None if written is None else json.loads(written)
    except RecursionError as error:
        raise ValueError(f"its {LORA_ADAPTER_METADATA_KEY} is nested too deeply") from error
    if not isinstance(metadata, dict | None):
        raise ValueError(f"its {LORA_ADAPTER_METADATA_KEY} is no mapping")
    return metadata


def _as_peft(weights: dict[str, T], component: Any, text: bool) -> dict[str, T]:
    """The weights of one part by the names that PEFT gives them."""
    if not text:
        first = next(iter(weights))
        if "lora_A" in first:
            return weights
        renamed: dict[str, T] = convert_unet_state_dict_to_peft(weights)
        return renamed
    weights = convert_state_dict_to_peft(convert_state_dict_to_diffusers(weights))
    if hasattr(component, "text_model"):
        return weights
    return {name.removeprefix("text_model."): weight for name, weight in weights.items()}


def _check_shapes(weights: Mapping[str, Tensor], part: str, component: nn.Module) -> None:
    """Raise ValueError unless each layer has both of its factors, of one rank, and they fit it."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        place, _, factor = name.removesuffix(".weight").rpartition(".")
        if factor not in _FACTORS or not name.endswith(".weight"):
            raise ValueError(f"{part}.{name} is no weight of a LoRA that is read here")
        pairs.setdefault(place, {})[factor] = weight
    for name, pair in pairs.items():
        what = f"{part}.{name}"
        try:
            layer = component.get_submodule(name)
        except AttributeError:
            raise ValueError(f"{what} is no layer of it") from None
        base = getattr(layer, "base_layer", layer)
        if not isinstance(base, nn.Linear | nn.Conv2d):
            raise ValueError(f"{what} is a {type(base).__name__}, which no LoRA is loaded on")
        if missing := [factor for factor in _FACTORS if factor not in pair]:
            raise ValueError(f"{what} has no {missing[0]}")
        down, kernel = pair["lora_A"], tuple(base.weight.shape[2:])
        rank = down.shape[0] if down.ndim else 0
        takes: tuple[int, ...] = (rank, base.weight.shape[1], *kernel)
        gives: tuple[int, ...] = (base.weight.shape[0], rank, *(1 for _ in kernel))
        for factor, wanted in (("lora_A", takes), ("lora_B", gives)):
            if tuple(pair[factor].shape) != wanted or not rank:
                given = _times(pair[factor].shape)
                raise ValueError(f"{factor} of {what} is {given}, and the layer takes {_times(wanted)}")


def _alphas_of(names: Mapping[str, str], part: str, alphas: dict[str, float]) -> dict[str, float]:
    """The alphas of the layers of a part, which are taken out of `alphas`.

    Args:
        names: what diffusers calls the weights, by PEFT's names.
    """
    found: dict[str, float] = {}
    for name, theirs in names.items():
        layer, _, factor = name.removesuffix(".weight").rpartition(".")
        key = f"{part}.{theirs.split('.lora.')[0].split('.lora_A.')[0]}.alpha"
        if factor == "lora_A" and key in alphas:
            found[layer] = alphas.pop(key)
    return found


def _ranks(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Of the layers of a part, whose weights have the shapes that they take."""
    end = ".lora_A.weight"
    return {name.removesuffix(end): len(weight) for name, weight in weights.items() if name.endswith(end)}


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a number"
