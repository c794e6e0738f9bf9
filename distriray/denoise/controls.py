"""ControlNets of a pipeline: loaded and checked once, and used by the requests that name them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from diffusers.image_processor import VaeImageProcessor
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from distriray.controls import Control, ControlNetSpec
from distriray.denoise.pipelines.base import Commission, PictureOf, PipelineSteps
from distriray.denoise.state import DenoiseState
from distriray.denoise.weight_files import digest_of, first_lines
from distriray.errors import DistrirayError, UnsupportedModel, UnusableControlNet
from distriray.names import check_names
from distriray.parallel.networks.controls import UsedControl
from distriray.parallel.networks.registry import denoising_module
from distriray.picture import Picture, opaque
from distriray.requests import image_of
from distriray.steps import is_controlled

_VALUE = "controls"
_PICTURE = "control_picture_{}"


class _Loaded(NamedTuple):
    """A ControlNet in memory."""

    network: nn.Module
    picture_of: PictureOf
    path: Path
    file: str
    pixel_range: tuple[float, float]
    mode: int | None

    @property
    def digest(self) -> str:
        """Tells its file, and the mode of a union, from others."""
        return self.file if self.mode is None else f"{self.file} as {self.mode}"


class Controls:
    """The ControlNets of one pipeline. One thread uses it.

    Args:
        pipeline: of diffusers.
        family: its name in `pipelines.registry.PIPELINES`.
        steps: of the pipeline.
    """

    def __init__(self, pipeline: Any, family: str, steps: PipelineSteps) -> None:
        self._family, self._steps = family, steps
        self._denoises = denoising_module(pipeline)
        self._loaded: dict[str, _Loaded] = {}

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """By name; what sees their pictures alone is not in them."""
        return {name: loaded.network for name, loaded in self._loaded.items()}

    def load(self, spec: ControlNetSpec) -> None:
        """Read a ControlNet, and keep it; raises UnusableControlNet unless it fits the pipeline."""
        what, kind = f"ControlNet {spec.name!r}", self._steps.control_kind
        if kind is None:
            raise UnusableControlNet(f"{what}: the model is {self._family}, which draws with none here")
        if spec.families and self._family not in spec.families:
            raise UnusableControlNet(f"{what} is for {', '.join(spec.families)}; the model is {self._family}")
        path, pixel_range = spec.locate(), spec.pixel_range or self._steps.control_range
        known = next((loaded for loaded in self._loaded.values() if loaded.path == path), None)
        try:
            if known is None:
                network = _read(path, kind, self._denoises.device, self._denoises.dtype)
                picture_of = self._steps.take_control(network)
                known = _Loaded(network, picture_of, path, digest_of(path), pixel_range, spec.mode)
            _check_mode(known.network, spec.mode)
        except (DistrirayError, OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
            raise UnusableControlNet(f"{what} cannot be used: {path}: {first_lines(error)}") from error
        self._loaded[spec.name] = known._replace(pixel_range=pixel_range, mode=spec.mode)

    @torch.no_grad()
    def prepare(self, asked: Iterable[Control], commission: Commission) -> dict[str, Any]:
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
            loaded = self._loaded[control.name]
            pixels = processor.preprocess(image, commission.height, commission.width)
            black, white = loaded.pixel_range
            pixels = (pixels * (white - black) + black).contiguous()  # other layouts round differently
            values[_PICTURE.format(len(entries))] = loaded.picture_of(pixels, commission)
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

    def of_step(self, state: DenoiseState) -> tuple[UsedControl, ...]:
        """The ControlNets that take part in the next step."""
        controls = []
        for index, (name, _, scale, start, end) in enumerate(state.values.get(_VALUE, ())):
            if is_controlled(state.step, state.num_steps, start, end):
                picture = state.values[_PICTURE.format(index)]
                loaded = self._loaded[name]
                controls.append(UsedControl(name, loaded.network, picture, scale, loaded.mode))
        return tuple(controls)


def _check_mode(network: Any, mode: int | None) -> None:
    """Raise UnsupportedModel unless a union has a mode, one that it knows, and what is none has none."""
    modes = network.config.get("num_mode")
    if modes is None and mode is not None:
        raise UnsupportedModel(f"it is no union, and has no mode {mode}; leave it out")
    if modes is not None and (mode is None or mode >= modes):
        raise UnsupportedModel(f"it is a union of {modes} kinds; name one by its mode, from 0 to {modes - 1}")


def _read(path: Path, kind: Any, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The network of a safetensors file, by the configuration beside it."""
    config = json.loads((path.parent / "config.json").read_text())
    if not isinstance(config, dict) or config.get("_class_name", kind.__name__) != kind.__name__:
        own = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"it is a {own}; those of this model are {kind.__name__}")
    with init_empty_weights():  # else random ones are drawn first, in float32 and for seconds
        network: nn.Module = kind.from_config(config)
    # Copied, since what safetensors gives is the file itself, which may be replaced.
    weights = {name: weight.to(device, dtype, copy=True) for name, weight in load_file(path).items()}
    network.load_state_dict(weights, assign=True)
    nn.Module.to(network, device, dtype)  # what no file has; diffusers' own warns of nothing in particular
    return network.eval().requires_grad_(False)
