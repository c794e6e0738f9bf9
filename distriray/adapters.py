"""Adapters (LoRA) by name: those that come with a model, that a pool lists, and that a folder has now."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from distriray.errors import ModelNotFound, UnusableAdapter
from distriray.models import BUILTIN, ModelSpec, download
from distriray.names import NAME, check_names

log = logging.getLogger("ray.serve.distriray")

SUFFIX = ".safetensors"
LOOK_S = 2.0
"""How long what was seen in a folder is taken to be there."""

CACHE_BYTES = 2**30
"""Memory of a worker for adapters, unless it is told otherwise."""

MOST_IN_FOLDER = 1000
"""Adapters that are taken from a folder, the first by name."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class Lora(BaseModel):
    """An adapter to draw with."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    name: Annotated[str, Field(pattern=NAME)]
    """One of those that the model is served with."""
    scale: Annotated[float, Field(ge=-10.0, le=10.0, allow_inf_nan=False)] = 1.0
    """How much it counts; 0 is not at all."""


class AdapterSpec(BaseModel):
    """An adapter, and where its weights are.

    Attributes:
        name: by which requests ask for it.
        source: a `.safetensors` file, or a Hugging Face id.
        file: of a Hugging Face id: which of its files; by default the one that diffusers writes.
        revision: branch, tag or commit of a Hugging Face id.
        families: of pipelines that it is for, such as `StableDiffusionXL`; empty leaves it to its weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=NAME)]
    source: str
    file: Annotated[str, Field(pattern=r"\.safetensors$")] = "pytorch_lora_weights.safetensors"
    revision: str | None = None
    families: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether the source is a file, there or not, and no Hugging Face id."""
        local = Path(self.source).expanduser()
        return local.suffix == SUFFIX or local.exists()

    def locate(self) -> Path:
        """The local file; from the Hugging Face Hub it is downloaded, if not cached.

        Raises:
            UnusableAdapter: there is none; saying what was looked for, and where.
        """
        local = Path(self.source).expanduser()
        if self.is_local:
            if not local.exists():
                raise UnusableAdapter(f"adapter {self.name!r}: there is no file {local.absolute()}")
            if local.suffix != SUFFIX or not local.is_file():
                raise UnusableAdapter(
                    f"adapter {self.name!r}: {local.absolute()} is no {SUFFIX} file; others are not read"
                )
            return local
        if not _HUB_ID.fullmatch(self.source):
            raise UnusableAdapter(
                f"adapter {self.name!r}: {self.source!r} is neither a {SUFFIX} file nor a Hugging Face id"
            )
        try:
            model = ModelSpec(name=self.source, revision=self.revision)
            file = download(model, local, (self.file,)) / self.file
        except ModelNotFound as error:
            raise UnusableAdapter(f"adapter {self.name!r}: {error}") from error
        if not file.is_file():
            raise UnusableAdapter(f"adapter {self.name!r}: {self.source} has no {self.file}; set `file`")
        return file


class Catalogue:
    """The adapters that a host may be asked for. One thread uses it.

    Args:
        model: the name of the host's model, with which some may come.
        listed: by the configuration. Of several with one name these go first, then the folder's.
        folder: each `.safetensors` file in it is an adapter by the name of the file. It is looked at again
            while it is used.

    Attributes:
        edition: changes with what there is.
    """

    def __init__(self, model: str, listed: Iterable[AdapterSpec] = (), folder: Path | None = None) -> None:
        self._listed = {spec.name: spec for spec in listed}
        self._built_in = {spec.name: spec for spec in built_in(model)}
        self._folder = None if folder is None else folder.expanduser()
        if self._folder is not None and not self._folder.is_dir():
            log.warning("there is no folder of adapters %s; what comes to be in it counts", self._folder)
        self._looked_s = -LOOK_S
        self._specs: Mapping[str, AdapterSpec] = {}
        self.edition = 0

    @property
    def specs(self) -> Mapping[str, AdapterSpec]:
        """By name, in order of their names."""
        if time.monotonic() - self._looked_s >= LOOK_S:
            self.look()
        return self._specs

    @property
    def names(self) -> tuple[str, ...]:
        """Of all adapters, in order."""
        return tuple(self.specs)

    def look(self) -> None:
        """Look at the folder now."""
        self._looked_s = time.monotonic()
        found = {**self._built_in, **self._in_folder(), **self._listed}
        specs = dict(sorted(found.items()))
        if specs != self._specs:
            self._specs = specs
            self.edition += 1

    def find(self, loras: Iterable[Lora]) -> tuple[AdapterSpec, ...]:
        """The adapters that a request names; raises as `check_names`."""
        loras = list(loras)
        if any(lora.name not in self.specs for lora in loras):
            self.look()  # it may just have come
        check_names("loras", loras, self.names)
        return tuple(self._specs[lora.name] for lora in loras)

    def _in_folder(self) -> dict[str, AdapterSpec]:
        if self._folder is None:
            return {}
        try:
            files = sorted(self._folder.glob(f"*{SUFFIX}"))
        except OSError as error:
            log.warning("the folder of adapters %s cannot be read: %s", self._folder, error)
            return {}
        named = [file for file in files if re.fullmatch(NAME, file.stem)]
        if len(named) > MOST_IN_FOLDER:
            log.warning("%s has %d adapters; the first %d count", self._folder, len(named), MOST_IN_FOLDER)
        return {
            file.stem: AdapterSpec(name=file.stem, source=str(file.absolute()))
            for file in named[:MOST_IN_FOLDER]
        }


def built_in(model: str) -> list[AdapterSpec]:
    """The adapters that come with a model of distriray."""
    if model != f"{BUILTIN}landscapes":
        return []
    from distriray.landscapes import ADAPTERS_DIR

    return [
        AdapterSpec(name=file.stem, source=str(file), families=("StableDiffusionXL",))
        for file in sorted(ADAPTERS_DIR.glob(f"*{SUFFIX}"))
    ]
