"""ControlNets by name: those that a pool lists."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from .errors import ControlNetNotFound, ModelNotFound, UnusableControlNet
from .models import ModelSpec, download
from .names import check_named
from .requests import ADAPTER_NAME, Control

MOST_CONTROLNETS = 16
"""That a pool may list: each worker has all of them in the memory of its device."""


class ControlNetSpec(BaseModel):
    """A ControlNet, and where its weights are.

    Attributes:
        name: by which requests ask for it.
        source: a folder that diffusers saved it to, a `.safetensors` file with its `config.json` beside it,
            or a Hugging Face id.
        file: of a folder or a Hugging Face id: which of its files.
        revision: branch, tag or commit of a Hugging Face id.
        families: of pipelines that it is for, such as `StableDiffusionXL`; empty leaves it to its weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=ADAPTER_NAME)]
    source: str
    file: Annotated[str, Field(pattern=r"\.safetensors$")] = "diffusion_pytorch_model.safetensors"
    revision: str | None = None
    families: tuple[str, ...] = ()

    def locate(self) -> Path:
        """The local file of its weights; from the Hugging Face Hub it is downloaded, if not cached.

        Raises:
            UnusableControlNet: there is none, or no configuration beside it.
        """
        local, what = Path(self.source).expanduser(), f"ControlNet {self.name!r}"
        if local.suffix == ".safetensors":
            path = local
        elif local.is_dir():
            path = local / self.file
        else:
            folder = str(Path(self.file).parent / "config.json")
            try:
                model = ModelSpec(name=self.source, revision=self.revision)
                path = download(model, local, (self.file, folder)) / self.file
            except (ModelNotFound, ValueError) as error:
                raise UnusableControlNet(f"{what}: {error}") from error
        for file in (path, path.parent / "config.json"):
            if not file.is_file():
                raise UnusableControlNet(f"{what}: there is no {file}; only safetensors are read")
        return path


def check_controls(controls: Iterable[Control], known: Iterable[str]) -> None:
    """Check what a request names.

    Raises:
        ControlNetNotFound: it is not among the known names, which are listed.
        InvalidRequest: it is named more than once.
    """
    names = (control.name for control in controls)
    check_named("control", names, sorted(known), "ControlNet", ControlNetNotFound)
