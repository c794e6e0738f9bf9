"""IP-Adapters by name: those that a pool lists."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from distriray.errors import ModelNotFound, UnusableIPAdapter
from distriray.models import ModelSpec, download, is_hub_id
from distriray.names import NAME
from distriray.picture import CarriedPicture

_ENCODER_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")


class IPAdapter(BaseModel):
    """An IP-Adapter to draw with, and the picture that it takes after."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    name: Annotated[str, Field(pattern=NAME)]
    """One of those that the model is served with."""
    image: CarriedPicture
    """What is drawn like it, as a `data:` URL. Its middle square is looked at."""
    scale: Annotated[float, Field(ge=-10.0, le=10.0, allow_inf_nan=False)] = 1.0
    """How much it counts beside the prompt; 0 is not at all."""


class IPAdapterFiles(NamedTuple):
    """The weights of an IP-Adapter, and the folder of its image encoder."""

    weights: Path
    image_encoder: Path


class IPAdapterSpec(BaseModel):
    """An IP-Adapter, and where its weights are.

    Attributes:
        name: by which requests ask for it.
        source: a folder, a `.safetensors` file, or a Hugging Face id such as `h94/IP-Adapter`.
        file: of a folder or a Hugging Face id: which of its files, such as
            `models/ip-adapter_sd15.safetensors`.
        image_encoder: folder of the `CLIPVisionModelWithProjection` that reads its pictures: beside the file,
            or with a `/` from the source, as diffusers has it; or an absolute path, or where the source has
            no such folder a Hugging Face id such as `openai/clip-vit-large-patch14`. IP-Adapters with one
            folder share it.
        revision: branch, tag or commit of a source that is a Hugging Face id.
        families: of pipelines that it is for, such as `StableDiffusionXL`; empty leaves it to its weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=NAME)]
    source: str
    file: Annotated[str, Field(pattern=r"\.safetensors$")] = "ip-adapter.safetensors"
    image_encoder: Annotated[str, Field(min_length=1)] = "image_encoder"
    revision: str | None = None
    families: tuple[str, ...] = ()

    def locate(self) -> IPAdapterFiles:
        """Its local files; from the Hugging Face Hub they are downloaded, if not cached.

        Raises:
            UnusableIPAdapter: there are none.
        """
        local, what = Path(self.source).expanduser(), f"IP-Adapter {self.name!r}"
        is_file = local.suffix == ".safetensors"
        folder, file = (local.parent, local.name) if is_file else (local, self.file)
        inside = PurePosixPath(file).parent if "/" not in self.image_encoder else PurePosixPath()
        encoder = inside / Path(self.image_encoder).expanduser()
        try:
            if not is_file and not folder.is_dir():
                model = ModelSpec(name=self.source, revision=self.revision)
                folder = download(model, local, (file, *(str(encoder / each) for each in _ENCODER_FILES)))
            found = IPAdapterFiles(folder / file, folder / encoder)
            if is_hub_id(self.image_encoder) and not found.image_encoder.is_dir():
                own = download(ModelSpec(name=self.image_encoder), found.image_encoder, _ENCODER_FILES)
                found = found._replace(image_encoder=own)
        except ModelNotFound as error:
            raise UnusableIPAdapter(f"{what}: {error}") from error
        for path in (found.weights, found.image_encoder / "config.json"):
            if not path.is_file():
                raise UnusableIPAdapter(f"{what}: there is no {path}; only safetensors are read")
        return found
