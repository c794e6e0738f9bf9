"""Facts of a model that are known before any worker has loaded it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from distriray.denoise.pipelines.registry import PIPELINES, PipelineFamily, family_named
from distriray.denoise.pipelines.sizes import Configs, Sizes, configs_in
from distriray.denoise.pipelines.terms import Terms
from distriray.errors import ModelNotFound
from distriray.models import BUILTIN, ModelSpec, locate, read_index

Known = TypeVar("Known", Sizes, Terms)


def sizes_of(spec: ModelSpec) -> Sizes | None:
    """The sizes of a model whose folder this machine has; None for others, and where no host will start."""
    return _known(spec, lambda family, configs: family.sizes(configs))


def terms_of(spec: ModelSpec) -> Terms | None:
    """The model's terms for the other fields of requests; None as for `sizes_of`."""
    return _known(spec, lambda family, configs: family.terms(configs))


def _known(spec: ModelSpec, read: Callable[[PipelineFamily, Configs], Known]) -> Known | None:
    if not spec.name.startswith(BUILTIN) and not Path(spec.name).expanduser().is_dir():
        return None
    try:
        folder = locate(spec)
        family = family_named(read_index(folder)["_class_name"])
        return None if family is None else read(PIPELINES[family], configs_in(folder))
    except ModelNotFound:
        return None
