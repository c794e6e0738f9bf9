"""ControlNets of a pipeline: loaded and checked once, and used by the requests that name them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ControlNetModel
from diffusers.image_processor import VaeImageProcessor
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from distriray.controls import Control as Asked
from distriray.controls import ControlNetSpec
from distriray.denoise.state import DenoiseState
from distriray.denoise.weight_files import digest_of, first_lines
from distriray.errors import DistrirayError, UnusableControlNet
from distriray.names import check_names
from distriray.parallel.networks.controlnet import Control, Embedder, check_fits, split
from distriray.picture import Picture, opaque
from distriray.requests import image_of

_VALUE = "controls"
_PICTURE = "control_picture_{}"


class _Loaded(NamedTuple):
    """A ControlNet in memory; `digest` tells its file from others."""

    network: ControlNetModel
    embedder: Embedder
    digest: str


class Controls:
    """The ControlNets of one pipeline. One thread uses it.

    Args:
        pipeline: of diffusers.
        family: its name in `pipelines.registry.PIPELINES`.
    """

    def __init__(self, pipeline: Any, family: str) -> None:
        self._pipeline, self._family = pipeline, family
        self._loaded: dict[str, _Loaded] = {}

    @property
    def networks(self) -> Mapping[str, ControlNetModel]:
        """By name; what sees their pictures alone is not in them."""
        return {name: loaded.network for name, loaded in self._loaded.items()}

    def load(self, spec: ControlNetSpec) -> None:
        """Read a ControlNet, and keep it; raises UnusableControlNet unless it fits the pipeline."""
        what = f"ControlNet {spec.name!r}"
        if getattr(self._pipeline, "unet", None) is None:
            raise UnusableControlNet(f"{what}: the model is {self._family}, which draws with none here")
        if spec.families and self._family not in spec.families:
            raise UnusableControlNet(f"{what} is for {', '.join(spec.families)}; the model is {self._family}")
        unet, path = self._pipeline.unet, spec.locate()
        try:
            network = _read(path)
            check_fits(network, unet)
        except (DistrirayError, OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
            raise UnusableControlNet(f"{what} cannot be used: {path}: {first_lines(error)}") from error
        nn.Module.to(network, unet.device, unet.dtype)  # diffusers' own warns of nothing in particular
        self._loaded[spec.name] = _Loaded(network, split(network), digest_of(path))

    @torch.no_grad()
    def prepare(self, asked: Iterable[Asked], height: int, width: int) -> dict[str, Any]:
        """The values that a state keeps of a request's ControlNets; those with scale 0 are none.

        Raises:
            ControlNetNotFound: a name is not known.
            InvalidRequest: a picture is damaged, or not there.
        """
        asked = list(asked)
        check_names("control", asked, self._loaded)
        processor = VaeImageProcessor(do_convert_rgb=True, do_normalize=False)
        values: dict[str, Any] = {}
        entries: list[list[Any]] = []
        for index, control in enumerate(asked):
            name = image_of("control", index)
            image = opaque(Picture.of(control.image, name).load(name))
            if not control.scale:
                continue
            loaded, unet = self._loaded[control.name], self._pipeline.unet
            pixels = processor.preprocess(image, height=height, width=width).to(unet.device, unet.dtype)
            values[_PICTURE.format(len(entries))] = loaded.embedder(pixels)
            entries.append([control.name, loaded.digest, control.scale, control.start, control.end])
        return {**values, _VALUE: entries} if entries else {}

    def check(self, state: DenoiseState) -> None:
        """Raise UnusableControlNet unless the ControlNets that a state was begun with are here."""
        for name, digest, *_ in state.values.get(_VALUE, ()):
            if name not in self._loaded:
                raise UnusableControlNet(
                    f"ControlNet {name!r}, which the request was begun with, is not here"
                )
            if self._loaded[name].digest != digest:
                raise UnusableControlNet(
                    f"ControlNet {name!r} has other weights here than where the request was begun"
                )

    def of_step(self, state: DenoiseState) -> tuple[Control, ...]:
        """The ControlNets that take part in the next step, by diffusers' rule for shares of the steps."""
        controls = []
        for index, (name, _, scale, start, end) in enumerate(state.values.get(_VALUE, ())):
            first, last = state.step / state.num_steps, (state.step + 1) / state.num_steps
            if first >= start and last <= end:
                picture = state.values[_PICTURE.format(index)]
                controls.append(Control(name, self._loaded[name].network, picture, scale))
        return tuple(controls)


def _read(path: Path) -> ControlNetModel:
    """The network of a safetensors file, by the configuration beside it."""
    config = json.loads((path.parent / "config.json").read_text())
    if not isinstance(config, dict) or config.get("_class_name", "ControlNetModel") != "ControlNetModel":
        kind = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"it is a {kind}; known is ControlNetModel")
    network = ControlNetModel.from_config(config)
    network.load_state_dict(load_file(path))
    return network.eval().requires_grad_(False)
