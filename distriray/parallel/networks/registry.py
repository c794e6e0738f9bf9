"""Table of the network families. A new one is a file of `families` and one line of `NETWORKS`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from distriray.errors import UnsupportedModel
from distriray.parallel.networks.base import Network
from distriray.parallel.networks.local import LocalCode


@dataclass(frozen=True)
class NetworkFamily:
    """One family of networks.

    Attributes:
        home: module and name of its `Network`, imported when a pipeline has such a network; a leading dot is
            the folder `families`.
        models: those that it stands for, in the words of the message that lists what there is.
    """

    home: str
    models: str

    @property
    def network(self) -> type[Network]:
        """Its subclass of `Network`."""
        module, name = self.home.split(":")
        network: type[Network] = getattr(import_module(module, f"{__package__}.families"), name)
        return network


NETWORKS: dict[str, NetworkFamily] = {
    "UNet2DConditionModel": NetworkFamily(".unet:UNet", "Stable Diffusion 1.x, 2.x and XL"),
    "FluxTransformer2DModel": NetworkFamily(".flux:Flux", "FLUX.1"),
    "ChromaTransformer2DModel": NetworkFamily(".chroma:Chroma", "Chroma"),
    "Flux2Transformer2DModel": NetworkFamily(".flux2:Flux2", "FLUX.2"),
    "Flux3Transformer2DModel": NetworkFamily(".flux3:Flux3", "FLUX.3"),
    "SD3Transformer2DModel": NetworkFamily(".sd3:SD3", "Stable Diffusion 3 and 3.5"),
    "PixArtTransformer2DModel": NetworkFamily(".pixart:PixArt", "PixArt"),
    "QwenImageTransformer2DModel": NetworkFamily(".qwen_image:QwenImage", "Qwen-Image"),
    "QwenImage21Transformer2DModel": NetworkFamily(".qwen_image21:QwenImage21", "Qwen-Image 2.1"),
    "LongCatImageTransformer2DModel": NetworkFamily(".longcat_image:LongCatImage", "LongCat-Image"),
    "OvisImageTransformer2DModel": NetworkFamily(".ovis_image:OvisImage", "Ovis-Image"),
    "HunyuanImageTransformer2DModel": NetworkFamily(".hunyuan_image:HunyuanImage", "HunyuanImage 2.1"),
    "Krea2Transformer2DModel": NetworkFamily(".krea2:Krea2", "Krea 2"),
    "ErnieImageTransformer2DModel": NetworkFamily(".ernie_image:ErnieImage", "ERNIE-Image"),
    "ZImageTransformer2DModel": NetworkFamily(".z_image:ZImage", "Z-Image"),
}
"""Every family, by the name of its networks' class."""

_DENOISERS = ("unet", "transformer")  # the attributes of diffusers' pipelines that hold their network


def denoising_module(pipeline: Any) -> Any:
    """The module that a pipeline denoises with; what has none counts as such a module itself."""
    for name in _DENOISERS:
        module = getattr(pipeline, name, None)
        if module is not None:
            return module
    return pipeline


def network_of(pipeline: Any, local: LocalCode | None = None) -> Network:
    """The network of a diffusers pipeline, or of a module by itself, if patch parallelism knows it.

    Args:
        local: the code in it that works on some rows without the others; what is known to if None.

    Raises:
        UnsupportedModel: it is of no family in `NETWORKS`, which the message lists, or its family refuses it.
    """
    module = denoising_module(pipeline)
    for base in type(module).__mro__:
        family = NETWORKS.get(base.__name__)
        if family is not None and isinstance(module, family.network.kind):
            return family.network(module, local)
    known = "; ".join(f"a {name}: {family.models}" for name, family in NETWORKS.items())
    raise UnsupportedModel(
        f"{type(pipeline).__name__} denoises with {type(module).__name__}; "
        f"supported are pipelines around {known}"
    )
