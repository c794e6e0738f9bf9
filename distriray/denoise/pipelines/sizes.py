"""The sizes of a family's pictures, by configurations alone: neither torch nor diffusers is loaded here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path
from typing import Any

from distriray.models import index_file, read_values
from distriray.requests import MULTIPLE_OF

Configs = Callable[[str], Mapping[str, Any]]
"""The configuration of a component, such as `unet`, of a pipeline or of the folder that it was saved to.

That of the pipeline itself has the name `""`.
"""
_CONFIG_FILES = {"guider": "guider_config.json"}
"""Of components that diffusers saves with a file of another name."""


@dataclass(frozen=True)
class Sizes:
    """A model's terms for heights and widths, all in pixels.

    Attributes:
        default: (height, width) of a request that names none.
        unit: heights and widths are multiples of it.
        latent_row: height of one row of latents.
    """

    default: tuple[int, int]
    unit: int
    latent_row: int


def unet_sizes(config: Configs) -> Sizes:
    """Of a U-Net that denoises the latents of a VAE."""
    sample, scale = config("unet")["sample_size"], _vae_scale(config)
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return Sizes((height * scale, width * scale), unit=max(scale, MULTIPLE_OF), latent_row=scale)


def sd3_sizes(config: Configs) -> Sizes:
    """Of a transformer over square patches of a VAE's latents."""
    transformer, scale = config("transformer"), _vae_scale(config)
    side = transformer["sample_size"] * scale
    return Sizes((side, side), unit=lcm(scale * transformer["patch_size"], MULTIPLE_OF), latent_row=scale)


def flux_sizes(config: Configs) -> Sizes:
    """Of a transformer over 2x2 latents."""
    return _packed_sizes(_vae_scale(config))


def flux2_sizes(config: Configs) -> Sizes:
    """Of the same where the pipeline's latents are those tokens."""
    return replace(flux_sizes(config), latent_row=2 * _vae_scale(config))


def qwen_image_sizes(config: Configs) -> Sizes:
    """Of the same on the latents of a VAE for moving pictures."""
    return _packed_sizes(2 ** len(config("vae")["temperal_downsample"]))


def qwen_image21_sizes(config: Configs) -> Sizes:
    """Of a transformer over the latents of a VAE of 16 pixels a row, four of which stand in one place."""
    return Sizes((1024, 1024), unit=32, latent_row=16)


def hunyuan_image_sizes(config: Configs) -> Sizes:
    """Of a transformer over patches of the latents of a VAE that says how much smaller these are."""
    scale, patch = config("vae")["spatial_compression_ratio"], config("transformer")["patch_size"]
    side = 64 * scale  # as diffusers has it
    return Sizes((side, side), unit=lcm(scale * lcm(*patch), MULTIPLE_OF), latent_row=scale)


def _packed_sizes(scale: int) -> Sizes:
    """Of a transformer that has no size of its own: diffusers takes 128 rows of latents, 1024 pixels."""
    return Sizes((128 * scale, 128 * scale), unit=lcm(2 * scale, MULTIPLE_OF), latent_row=scale)


def _vae_scale(config: Configs) -> int:
    """Pixels to a row of latents: every level of the VAE but the first halves the picture."""
    scale: int = 2 ** (len(config("vae")["block_out_channels"]) - 1)
    return scale


def configs_of(pipeline: Any) -> Configs:
    """The configurations of a loaded pipeline's components."""
    return lambda name: (pipeline.components[name] if name else pipeline).config


def configs_in(folder: Path) -> Configs:
    """The configurations of the components of a saved pipeline; a damaged one raises ModelNotFound."""

    def config(name: str) -> Mapping[str, Any]:
        file = _CONFIG_FILES.get(name, "config.json")
        return read_values(folder / name / file if name else index_file(folder))

    return config
