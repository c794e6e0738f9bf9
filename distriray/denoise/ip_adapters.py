"""IP-Adapters of a pipeline: loaded and checked once, and in its network for requests that name them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFullImageProjection,
    IPAdapterPlusImageProjection,
)
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from distriray.denoise.pipelines.base import PipelineSteps
from distriray.denoise.pipelines.image_prompts import ImagePrompt
from distriray.denoise.pipelines.prompted import Parts
from distriray.denoise.state import DenoiseState
from distriray.denoise.weight_files import digest_of, first_lines
from distriray.errors import DistrirayError, UnusableIPAdapter
from distriray.ip_adapters import IPAdapter, IPAdapterSpec
from distriray.names import check_names
from distriray.parallel.networks.registry import denoising_module
from distriray.picture import Picture, opaque
from distriray.requests import image_of

_VALUE = "ip_adapters"
_EMBEDS = "ip_adapter_embeds_{}"
_PROJECTIONS = ImageProjection, IPAdapterFullImageProjection, IPAdapterPlusImageProjection
_LONGEST = 4
"""How many times as long as wide a picture may be where it is scaled and its middle square cut out."""


class _Encoder:
    """An image encoder as diffusers' pipelines use theirs."""

    encode_image = StableDiffusionPipeline.encode_image

    def __init__(self, image_encoder: Any, feature_extractor: Any) -> None:
        self.image_encoder, self.feature_extractor = image_encoder, feature_extractor


class _Loaded(NamedTuple):
    """An IP-Adapter in memory; `digest` tells its file from others."""

    encoder: _Encoder
    parts: Parts
    digest: str

    def encode(self, image: Image.Image, device: torch.device) -> Tensor:
        """The embeddings of [nothing, a picture]: (2, 1, channels) or (2, 1, tokens, channels)."""
        whole = not isinstance(self.parts.projection, ImageProjection)
        embeds, negative = self.encoder.encode_image(_middle(image), device, 1, whole)
        return torch.stack([negative, embeds])


class _Used(NamedTuple):
    """An IP-Adapter of a request."""

    name: str
    digest: str
    scale: float


class IPAdapters:
    """The IP-Adapters of one pipeline. One thread uses it.

    Those of the request at hand are in the network, and none else: without any it is the network that it was
    before, layer by layer and object by object.

    Args:
        pipeline: of diffusers.
        family: its name in `pipelines.registry.PIPELINES`.
        steps: of the pipeline.
    """

    def __init__(self, pipeline: Any, family: str, steps: PipelineSteps) -> None:
        self._pipeline, self._family = pipeline, family
        self._denoises = denoising_module(pipeline)
        self._network = None if steps.prompted is None else steps.prompted(pipeline)
        self._loaded: dict[str, _Loaded] = {}
        self._encoders: dict[Path, _Encoder] = {}
        self._used: tuple[_Used, ...] = ()

    @torch.no_grad()
    def load(self, spec: IPAdapterSpec) -> None:
        """Read an IP-Adapter, and keep it; raises UnusableIPAdapter unless it fits the pipeline.

        Source: Ye et al. 2023 (arXiv 2308.06721).
        """
        what, network = f"IP-Adapter {spec.name!r}", self._network
        if network is None:
            raise UnusableIPAdapter(f"{what}: the model is {self._family}, which draws with none here")
        if spec.families and self._family not in spec.families:
            raise UnusableIPAdapter(f"{what} is for {', '.join(spec.families)}; the model is {self._family}")
        self._switch(())
        if network.is_taken:
            raise UnusableIPAdapter(f"{what}: the model has a projection of image prompts of its own")
        files = spec.locate()
        try:
            parts = network.read(files.weights)
            if not isinstance(parts.projection, _PROJECTIONS):
                kind = type(parts.projection).__name__
                raise ValueError(f"its pictures are read by a {kind}, and not by CLIP")
            loaded = _Loaded(self._encoder(files.image_encoder), parts, digest_of(files.weights))
            tokens = parts.projection(loaded.encode(Image.new("RGB", (64, 64)), self._denoises.device)[1])
            width = next(iter(parts.attention.values())).cross_attention_dim
            if tokens.shape[-1] != width:
                raise ValueError(
                    f"its image_proj gives tokens of {tokens.shape[-1]}, and the model's have {width}"
                )
        except (DistrirayError, OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
            message = f"{what} cannot be used: {files.weights}: {first_lines(error)}"
            raise UnusableIPAdapter(message) from error
        self._loaded[spec.name] = loaded

    @torch.no_grad()
    def prepare(self, asked: Iterable[IPAdapter]) -> dict[str, Any]:
        """The values that a state keeps of a request's IP-Adapters; those with scale 0 are none.

        Raises:
            IPAdapterNotFound: a name is not known.
            InvalidRequest: a picture is damaged.
        """
        asked = list(asked)
        check_names("ip_adapters", asked, self._loaded)
        values: dict[str, Any] = {}
        entries: list[list[Any]] = []
        for index, each in enumerate(asked):
            name = image_of("ip_adapters", index)
            image = opaque(Picture.of(each.image, name).load(name))
            if not each.scale:
                continue
            loaded = self._loaded[each.name]
            values[_EMBEDS.format(len(entries))] = loaded.encode(image, self._denoises.device)
            entries.append([each.name, loaded.digest, each.scale])
        return {**values, _VALUE: entries} if entries else {}

    def use(self, state: DenoiseState) -> None:
        """Put the IP-Adapters that a state was begun with into the network, and no others.

        Raises:
            UnusableIPAdapter: one is not here, or has other weights.
        """
        used = tuple(_Used(*entry) for entry in state.values.get(_VALUE, ()))
        for name, digest, _ in used:
            if name not in self._loaded:
                raise UnusableIPAdapter(f"IP-Adapter {name!r}, which the request was begun with, is not here")
            if self._loaded[name].digest != digest:
                raise UnusableIPAdapter(
                    f"IP-Adapter {name!r} has other weights here than where the request was begun"
                )
        if used != self._used:
            self._switch(used)

    def prompts(self, state: DenoiseState) -> tuple[ImagePrompt, ...]:
        """The image prompts that the IP-Adapters of a state attend to."""
        entries = state.values.get(_VALUE, ())
        return tuple(
            ImagePrompt(name, state.values[_EMBEDS.format(index)]) for index, (name, *_) in enumerate(entries)
        )

    def _switch(self, used: tuple[_Used, ...]) -> None:
        assert self._network is not None
        self._network.take_out()
        self._used = ()
        if used:
            parts = [self._loaded[name].parts for name, *_ in used]
            self._network.put_in(parts, [scale for *_, scale in used])
        self._used = used

    def _encoder(self, folder: Path) -> _Encoder:
        """The image encoder in a folder, with the pipeline's own feature extractor if it has one."""
        key = folder.resolve()
        if key not in self._encoders:
            denoises = self._denoises
            network, found = CLIPVisionModelWithProjection.from_pretrained(
                key,
                dtype=denoises.dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
            if missing := sorted(found["missing_keys"]):
                raise ValueError(f"the image encoder in {folder} has no {missing[0]}")
            side = network.config.image_size
            processor = getattr(self._pipeline, "feature_extractor", None)
            if processor is None:
                processor = CLIPImageProcessor(size=side, crop_size=side)
            network = network.to(denoises.device).eval().requires_grad_(False)
            self._encoders[key] = _Encoder(network, processor)
        return self._encoders[key]


def _middle(image: Image.Image) -> Image.Image:
    """The middle of a long strip, which whole and scaled to the encoder's size may be beyond all memory."""
    most = _LONGEST * min(image.size)
    # an even number of pixels goes, so that the middle stays where it is
    left, top = (max(0, side - most) // 2 for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image
