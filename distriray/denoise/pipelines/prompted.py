"""Networks that IP-Adapters are put into: where, and which weights they have there."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers.loaders import FluxIPAdapterMixin, IPAdapterMixin
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from safetensors.torch import load_file
from torch import Tensor, nn

Weights = dict[str, dict[str, Tensor]]
"""Those of an IP-Adapter as diffusers has them: by the parts `image_proj` and `ip_adapter`, and by name."""

_OF_XLABS = (
    (r"ip_adapter_proj_model\.(.+)", r"image_proj.\1"),
    (
        r"double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_([kv])_proj\.(.+)",
        r"ip_adapter.\1.to_\2_ip.\3",
    ),
)
"""What the weights of XLabs' IP-Adapters are called, and what diffusers calls them."""
_OF_PROJECTION = {"norm.bias": 1, "norm.weight": 1, "proj.bias": 1, "proj.weight": 2}
"""Dimensions of the weights of the projections that diffusers reads for FLUX.1."""


class Parts(NamedTuple):
    """What an IP-Adapter puts into a network; `attention` are processors, by the names of the layers."""

    projection: nn.Module
    attention: Mapping[str, Any]


class Prompted(ABC):
    """A network with places for IP-Adapters; without any it is, object by object, as it was before.

    Args:
        pipeline: of diffusers, around it.

    Attributes:
        component: what pipelines call it.
        loader: what loads IP-Adapters into such a pipeline.
        network: diffusers'.
        layers: the names of the layers of attention that they are in, in the order of their weights.
    """

    component: ClassVar[str]
    loader: ClassVar[Any]

    def __init__(self, pipeline: Any) -> None:
        self.network = getattr(pipeline, self.component)
        self.layers = self.places()
        self._has_place = hasattr(self.network, "encoder_hid_proj")
        self._replaced: dict[str, Any] = {}  # processors of the network, where those of IP-Adapters are

    @abstractmethod
    def places(self) -> list[str]:
        """`layers`, of the network without any."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The weights of attention that one for this network has, by their names in `ip_adapter`."""

    def named(self, name: str) -> str:
        """What diffusers calls a weight that has this name in a file."""
        return name

    def check(self, weights: Weights) -> None:
        """Raise ValueError, naming what does not fit, unless it has weights for each layer and no more."""
        own, shapes = weights["ip_adapter"], self.shapes()
        if any("lora" in name for name in own):
            raise ValueError("it has a LoRA within, as those for faces have, which are not read")
        for name in [*shapes, *own]:
            shape = tuple(own[name].shape) if name in own else None
            if shape != shapes.get(name):
                raise ValueError(
                    f"its ip_adapter.{name} is {_said(shape)}, and the model's {_said(shapes.get(name))}"
                )

    @property
    def is_taken(self) -> bool:
        """Whether there are image prompts in the network already."""
        return getattr(self.network, "encoder_hid_proj", None) is not None

    def read(self, path: Path) -> Parts:
        """The parts of the IP-Adapter in a file; raises ValueError, SafetensorError or OSError.

        None is in the network before, nor is after.
        """
        weights: Weights = {"image_proj": {}, "ip_adapter": {}}
        for name, tensor in load_file(path).items():
            part, _, rest = self.named(name).partition(".")
            if part not in weights:
                raise ValueError(f"its {name} is of no IP-Adapter, which has image_proj and ip_adapter")
            if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
                raise ValueError(f"its {name} is {str(tensor.dtype).removeprefix('torch.')}, or not finite")
            weights[part][rest] = tensor
        self.check(weights)
        processors = self.network.attn_processors
        self._replaced = {name.removesuffix(".processor"): each for name, each in processors.items()}
        try:
            without_pipeline = SimpleNamespace(**{self.component: self.network})
            self.loader.load_ip_adapter(without_pipeline, weights, subfolder="", weight_name="")
            (projection,) = self.network.encoder_hid_proj.image_projection_layers
            attention = {name: self.network.get_submodule(name).processor for name in self.layers}
        except KeyError as error:
            raise ValueError(f"it has no {error}") from error
        finally:
            self.network.encoder_hid_proj = nn.Module()
            self.take_out()
        for module in (projection, *attention.values()):
            module.eval().requires_grad_(False)
        return Parts(projection, attention)

    def put_in(self, parts: Sequence[Parts], scales: Sequence[float]) -> None:
        """Put IP-Adapters into the network, where none are, each with its scale."""
        self.network.encoder_hid_proj = MultiIPAdapterImageProjection([each.projection for each in parts])
        self.network.config.encoder_hid_dim_type = "ip_image_proj"
        for name in self.layers:
            attn = self.network.get_submodule(name)
            self._replaced[name] = attn.processor
            attn.set_processor(_together([each.attention[name] for each in parts], scales))

    def take_out(self) -> None:
        """Take out what is in the network, if there are any."""
        if not self._replaced:
            return
        for name, processor in self._replaced.items():
            self.network.get_submodule(name).set_processor(processor)
        self._replaced.clear()
        del self.network.encoder_hid_proj
        if self._has_place:
            self.network.encoder_hid_proj = None
        self.network.config.encoder_hid_dim_type = None


class PromptedUNet(Prompted):
    """A `UNet2DConditionModel`, which has them in all cross-attention."""

    component = "unet"
    loader = IPAdapterMixin

    def places(self) -> list[str]:
        names = [name.removesuffix(".processor") for name in self.network.attn_processors]
        return [name for name in names if not name.endswith("attn1")]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        layers = [self.network.get_submodule(name) for name in self.layers]
        return {
            f"{2 * index + 1}.{projection}.weight": (attn.inner_dim, attn.cross_attention_dim)
            for index, attn in enumerate(layers)
            for projection in ("to_k_ip", "to_v_ip")
        }


class PromptedFlux(Prompted):
    """A `FluxTransformer2DModel`, which has them in its blocks of two streams."""

    component = "transformer"
    loader = FluxIPAdapterMixin

    def places(self) -> list[str]:
        return [f"transformer_blocks.{index}.attn" for index in range(len(self.network.transformer_blocks))]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        width, text_width = self.network.inner_dim, self.network.config.joint_attention_dim
        return {
            f"{index}.{projection}.{kind}": shape
            for index in range(len(self.layers))
            for projection in ("to_k_ip", "to_v_ip")
            for kind, shape in (("weight", (width, text_width)), ("bias", (width,)))
        }

    def named(self, name: str) -> str:
        for theirs, diffusers in _OF_XLABS:
            if match := re.fullmatch(theirs, name):
                return match.expand(diffusers)
        return name

    def check(self, weights: Weights) -> None:
        super().check(weights)
        own = weights["image_proj"]
        for name in sorted(own.keys() | _OF_PROJECTION.keys()):
            shape = tuple(own[name].shape) if name in own else None
            if shape is None or len(shape) != _OF_PROJECTION.get(name):
                why = "" if shape is None else ", as no projection that is read has it"
                raise ValueError(f"its image_proj.{name} is {_said(shape)}{why}")


def _said(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else "x".join(map(str, shape)) or "one number"


def _together(processors: Sequence[Any], scales: Sequence[float]) -> Any:
    """One attention processor with the weights of several, as diffusers loads several at once."""
    first = processors[0]
    together = type(first)(first.hidden_size, first.cross_attention_dim, num_tokens=())
    together.scale = list(scales)
    together.to_k_ip = nn.ModuleList([each.to_k_ip[0] for each in processors])
    together.to_v_ip = nn.ModuleList([each.to_v_ip[0] for each in processors])
    return together.eval()
