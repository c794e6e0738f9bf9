"""IP-Adapters of a pipeline: loaded and checked once, and in its U-Net for requests that name them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders import IPAdapterMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFullImageProjection,
    IPAdapterPlusImageProjection,
    MultiIPAdapterImageProjection,
)
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from distriray.denoise.pipelines.image_prompts import ImagePrompt
from distriray.denoise.state import DenoiseState
from distriray.denoise.weight_files import digest_of, first_lines
from distriray.errors import DistrirayError, UnusableIPAdapter
from distriray.ip_adapters import IPAdapter, IPAdapterSpec
from distriray.names import check_names
from distriray.picture import Picture, opaque
from distriray.requests import image_of

_VALUE = "ip_adapters"
_EMBEDS = "ip_adapter_embeds_{}"
_PROJECTIONS = ImageProjection, IPAdapterFullImageProjection, IPAdapterPlusImageProjection
_LONGEST = 4
"""How many times as long as wide a picture may be where it is scaled and its middle square cut out."""


class _Loader(IPAdapterMixin):
    """diffusers' own loader, for a network without its pipeline."""

    def __init__(self, unet: Any) -> None:
        self.unet = unet


class _Encoder:
    """An image encoder as diffusers' pipelines use theirs."""

    encode_image = StableDiffusionPipeline.encode_image

    def __init__(self, image_encoder: Any, feature_extractor: Any) -> None:
        self.image_encoder, self.feature_extractor = image_encoder, feature_extractor


class _Loaded(NamedTuple):
    """An IP-Adapter in memory; `digest` tells its file from others.

    `attention` has its attention processors by the names of the layers.
    """

    encoder: _Encoder
    projection: nn.Module
    attention: Mapping[str, Any]
    digest: str

    def encode(self, image: Image.Image, device: torch.device) -> Tensor:
        """The embeddings of [nothing, a picture]: (2, 1, channels) or (2, 1, tokens, channels)."""
        whole = not isinstance(self.projection, ImageProjection)
        embeds, negative = self.encoder.encode_image(_middle(image), device, 1, whole)
        return torch.stack([negative, embeds])


class _Used(NamedTuple):
    """An IP-Adapter of a request."""

    name: str
    digest: str
    scale: float


class IPAdapters:
    """The IP-Adapters of one pipeline. One thread uses it.

    Those of the request at hand are in the U-Net, and none else: without any it is the U-Net that it was
    before, layer by layer and object by object.

    Args:
        pipeline: of diffusers.
        family: its name in `pipelines.registry.PIPELINES`.
    """

    def __init__(self, pipeline: Any, family: str) -> None:
        self._pipeline, self._family = pipeline, family
        self._loaded: dict[str, _Loaded] = {}
        self._encoders: dict[Path, _Encoder] = {}
        self._used: tuple[_Used, ...] = ()
        self._replaced: dict[str, Any] = {}  # processors of the network, where those of IP-Adapters are

    @torch.no_grad()
    def load(self, spec: IPAdapterSpec) -> None:
        """Read an IP-Adapter, and keep it; raises UnusableIPAdapter unless it fits the pipeline.

        Source: Ye et al. 2023 (arXiv 2308.06721).
        """
        what, unet = f"IP-Adapter {spec.name!r}", getattr(self._pipeline, "unet", None)
        if unet is None:
            raise UnusableIPAdapter(f"{what}: the model is {self._family}, which draws with none here")
        if spec.families and self._family not in spec.families:
            raise UnusableIPAdapter(f"{what} is for {', '.join(spec.families)}; the model is {self._family}")
        self._switch(())
        if unet.encoder_hid_proj is not None:
            raise UnusableIPAdapter(f"{what}: the model has a projection of image prompts of its own")
        files = spec.locate()
        try:
            projection, attention = self._read(files.weights)
            loaded = _Loaded(
                self._encoder(files.image_encoder), projection, attention, digest_of(files.weights)
            )
            tokens = projection(loaded.encode(Image.new("RGB", (64, 64)), unet.device)[1])
            width = next(iter(attention.values())).cross_attention_dim
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
            values[_EMBEDS.format(len(entries))] = loaded.encode(image, self._pipeline.unet.device)
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

    # Putting them in and taking them out

    def _switch(self, used: tuple[_Used, ...]) -> None:
        if self._replaced:
            self._take_out()
        self._used = ()
        if used:
            self._put_in(used)
        self._used = used

    def _put_in(self, used: Sequence[_Used]) -> None:
        unet, loaded = self._pipeline.unet, [self._loaded[name] for name, *_ in used]
        for name in loaded[0].attention:
            attn = unet.get_submodule(name)
            self._replaced[name] = attn.processor
            attn.set_processor(_together([each.attention[name] for each in loaded], used))
        unet.encoder_hid_proj = MultiIPAdapterImageProjection([each.projection for each in loaded])
        unet.config.encoder_hid_dim_type = "ip_image_proj"

    def _take_out(self) -> None:
        unet = self._pipeline.unet
        for name, processor in self._replaced.items():
            unet.get_submodule(name).set_processor(processor)
        self._replaced.clear()
        del unet.encoder_hid_proj
        unet.encoder_hid_proj = None
        unet.config.encoder_hid_dim_type = None

    # Reading

    def _read(self, path: Path) -> tuple[nn.Module, dict[str, Any]]:
        """The projection of an IP-Adapter and its attention processors; raises ValueError."""
        unet = self._pipeline.unet
        weights: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        for name, tensor in load_file(path).items():
            part, _, rest = name.partition(".")
            if part not in weights:
                raise ValueError(f"its {name} is of no IP-Adapter, which has image_proj and ip_adapter")
            if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
                raise ValueError(f"its {name} is {str(tensor.dtype).removeprefix('torch.')}, or not finite")
            weights[part][rest] = tensor
        _check_attention(weights["ip_adapter"], unet)
        layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, Attention)}
        before = {name: layer.processor for name, layer in layers.items()}
        attending = _cross_attention(unet)
        try:
            _Loader(unet).load_ip_adapter(weights, subfolder="", weight_name="")
            (projection,) = unet.encoder_hid_proj.image_projection_layers
            attention = {name: layers[name].processor for name in attending}
        except KeyError as error:
            raise ValueError(f"it has no {error}") from error
        finally:
            self._replaced = before
            unet.encoder_hid_proj = nn.Module()
            self._take_out()
        if not isinstance(projection, _PROJECTIONS):
            raise ValueError(f"its pictures are read by a {type(projection).__name__}, and not by CLIP")
        for module in (projection, *attention.values()):
            module.eval().requires_grad_(False)
        return projection, attention

    def _encoder(self, folder: Path) -> _Encoder:
        """The image encoder in a folder, with the pipeline's own feature extractor if it has one."""
        key = folder.resolve()
        if key not in self._encoders:
            unet = self._pipeline.unet
            network, found = CLIPVisionModelWithProjection.from_pretrained(
                key, dtype=unet.dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
            if missing := sorted(found["missing_keys"]):
                raise ValueError(f"the image encoder in {folder} has no {missing[0]}")
            side = network.config.image_size
            processor = getattr(self._pipeline, "feature_extractor", None)
            if processor is None:
                processor = CLIPImageProcessor(size=side, crop_size=side)
            network = network.to(unet.device).eval().requires_grad_(False)
            self._encoders[key] = _Encoder(network, processor)
        return self._encoders[key]


def _middle(image: Image.Image) -> Image.Image:
    """The middle of a long strip, which whole and scaled to the encoder's size may be beyond all memory."""
    most = _LONGEST * min(image.size)
    # an even number of pixels goes, so that the middle stays where it is
    left, top = (max(0, side - most) // 2 for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image


def _cross_attention(unet: Any) -> list[str]:
    """The names of the layers that attend to the text, in the order of an IP-Adapter's weights."""
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    return [name for name in names if not name.endswith("attn1")]


def _check_attention(weights: Mapping[str, Tensor], unet: Any) -> None:
    """Raise ValueError, naming what does not fit, unless it has weights for each layer and no more."""
    if any("lora" in name for name in weights):
        raise ValueError("it has a LoRA within, as those for faces have, which are not read")
    shapes: dict[str, tuple[int, ...]] = {}
    for index, name in enumerate(_cross_attention(unet)):
        attn = unet.get_submodule(name)
        for projection in ("to_k_ip", "to_v_ip"):
            shape = attn.inner_dim, attn.cross_attention_dim
            shapes[f"{2 * index + 1}.{projection}.weight"] = shape
    for name in [*shapes, *weights]:
        own = tuple(weights[name].shape) if name in weights else None
        if own != shapes.get(name):
            raise ValueError(
                f"its ip_adapter.{name} is {_said(own)}, and the model's {_said(shapes.get(name))}"
            )


def _said(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else "x".join(map(str, shape))


def _together(processors: Sequence[Any], used: Sequence[_Used]) -> Any:
    """One attention processor with the weights of several, as diffusers loads several at once."""
    first = processors[0]
    together = type(first)(first.hidden_size, first.cross_attention_dim, num_tokens=())
    together.num_tokens = [each.num_tokens[0] for each in processors]
    together.scale = [scale for *_, scale in used]
    together.to_k_ip = nn.ModuleList([each.to_k_ip[0] for each in processors])
    together.to_v_ip = nn.ModuleList([each.to_v_ip[0] for each in processors])
    return together.eval()
