"""A picture decoded by one device and by a gang: `python -m bench.decoding`.

The decoders of published VAEs, with weights of no meaning, as diffusers runs them on one rank and in patches
on all. Both in turn within each round, so that a machine whose speed drifts shifts them alike; ratios are
medians of the rounds' ratios. On CPUs ranks have one torch thread each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanImage,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
)

from bench.arguments import add_json, side
from bench.barrier import barrier, finish
from bench.report import Report
from distriray.arguments import at_least, positive
from distriray.collective import Communicator, launch
from distriray.parallel.decoder import PatchDecoder

VAES: dict[str, Callable[[], Any]] = {
    "sdxl": partial(
        AutoencoderKL,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    ),
    "qwen-image": AutoencoderKLQwenImage,
    "qwen-image-2.1": AutoencoderKLQwenImage21,
    "hunyuan-image": partial(
        AutoencoderKLHunyuanImage,
        in_channels=3,
        out_channels=3,
        latent_channels=64,
        block_out_channels=(128, 256, 512, 512, 1024, 1024),
        layers_per_block=2,
        spatial_compression_ratio=32,
        sample_size=384,
    ),
}


class Decoded(NamedTuple):
    """What a rank measured.

    Attributes:
        alone_s: of each round, seconds of the decoder on rank 0.
        together_s: of each round, seconds of the gang.
        apart: the largest difference of the two pictures, of the largest number of the one.
    """

    alone_s: list[float]
    together_s: list[float]
    apart: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vaes", choices=VAES, nargs="+", default=list(VAES))
    parser.add_argument("--size", type=side, default=256, help="pixels of a side (default 256)")
    parser.add_argument("--ranks", type=at_least(2), nargs="+", default=[2])
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_json(parser)
    options = parser.parse_args(arguments)
    report = Report(
        f"bench.decoding: a picture of {options.size}x{options.size}, decoded",
        ("VAE", "ranks", "one, s", "gang, s", "as fast", "apart"),
        seed=0,
        settings=vars(options),
    )
    for ranks in options.ranks:
        for name in options.vaes:
            shape = name, options.size, options.rounds
            measured: Decoded = launch(ranks, measure, *shape, device=options.device)[0]
            alone, together = measured.alone_s, measured.together_s
            report.add(
                name,
                str(ranks),
                f"{median(alone):.3f}",
                f"{median(together):.3f}",
                f"{median(a / t for a, t in zip(alone, together, strict=True)):.2f}x",
                f"{measured.apart:.1g}",
            )
    report.publish(options.json)


@torch.no_grad()
def measure(communicator: Communicator, name: str, size: int, rounds: int) -> Decoded:
    """Decode by rank 0 alone and by all, so often each, after a round that is not timed."""
    device = communicator.device
    torch.manual_seed(0)
    vae = VAES[name]().eval().to(device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    decoder = PatchDecoder(vae.decoder)
    decoder.install()
    latents = _latents(vae, size).to(device, vae.dtype)
    alone_s, together_s = list[float](), list[float]()
    for _ in range(rounds + 1):
        decoder.communicator = communicator
        barrier(communicator)
        expected = None
        if communicator.rank == 0:
            expected, seconds = _timed(decoder, vae, latents, alone=True)
            alone_s.append(seconds)
        barrier(communicator)
        picture, seconds = _timed(decoder, vae, latents, alone=False)
        together_s.append(seconds)
    if expected is None:
        return Decoded([], [], 0.0)
    apart = float((picture - expected).abs().max() / expected.abs().max())
    return Decoded(alone_s[1:], together_s[1:], apart)


def _latents(vae: Any, size: int) -> torch.Tensor:
    """Latents of a picture of that size, with a frame where the VAE was made for videos."""
    scale = vae.config.get("spatial_compression_ratio") or vars(vae).get("spatial_compression_ratio", 8)
    channels = vae.config.get("z_dim") or vae.config.latent_channels
    frame = (1,) if "z_dim" in vae.config else ()
    generator = torch.Generator().manual_seed(0)
    return torch.randn((1, channels, *frame, size // scale, size // scale), generator=generator)


def _timed(decoder: PatchDecoder, vae: Any, latents: torch.Tensor, alone: bool) -> tuple[torch.Tensor, float]:
    began = time.perf_counter()
    with decoder.alone() if alone else nullcontext():
        picture: torch.Tensor = vae.decode(latents, return_dict=False)[0]
    finish(latents.device)
    return picture, time.perf_counter() - began


if __name__ == "__main__":
    main()
