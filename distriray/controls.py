"""ControlNets by name: those that a pool lists."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from distriray.errors import InvalidRequest, ModelNotFound, UnusableControlNet
from distriray.models import ModelSpec, download
from distriray.names import NAME
from distriray.picture import CarriedPicture

Level = Annotated[float, Field(ge=-1000.0, le=1000.0, allow_inf_nan=False)]


class Control(BaseModel):
    """A ControlNet to draw with, and the picture that it goes by."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    name: Annotated[str, Field(pattern=NAME)]
    """One of those that the model is served with."""
    image: CarriedPicture
    """What it goes by, such as edges or depths, as a `data:` URL. It is scaled to the picture's size."""
    scale: Annotated[float, Field(ge=-10.0, le=10.0, allow_inf_nan=False)] = 1.0
    """How much it counts; 0 is not at all."""
    start: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """The share of the steps after which it begins."""
    end: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """The share of the steps at which it ends."""

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.start >= self.end:
            raise InvalidRequest(
                f"control {self.name!r} starts at {self.start:g} and ends at {self.end:g}; end it later",
                "control",
            )
        return self


class ControlNetSpec(BaseModel):
    """A ControlNet, and where its weights are.

    Attributes:
        name: by which requests ask for it.
        source: a folder that diffusers saved it to, a `.safetensors` file with its `config.json` beside it,
            or a Hugging Face id.
        file: of a folder or a Hugging Face id: which of its files.
        revision: branch, tag or commit of a Hugging Face id.
        families: of pipelines that it is for, such as `StableDiffusionXL`; empty leaves it to its weights.
        pixel_range: black and white as it is to be shown them, where its makers say otherwise than others do.
        mode: of a union of several ControlNets in one, which needs it: the number of the kind of picture.
            Specs of other modes with the same weights share them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=NAME)]
    source: str
    file: Annotated[str, Field(pattern=r"\.safetensors$")] = "diffusion_pytorch_model.safetensors"
    revision: str | None = None
    families: tuple[str, ...] = ()
    pixel_range: tuple[Level, Level] | None = None
    mode: Annotated[int, Field(ge=0)] | None = None

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
            except ModelNotFound as error:
                raise UnusableControlNet(f"{what}: {error}") from error
        for file in (path, path.parent / "config.json"):
            if not file.is_file():
                raise UnusableControlNet(f"{what}: there is no {file}; only safetensors are read")
        return path
