"""Trains the model's f8 autoencoder on drawn scenes.

    python -m distriray.landscapes.training.vae [--device cuda] [--steps 2000]

Reads the pictures that `dataset` rendered, writes `vae.pt` (resumable: the same command goes on where the
last one stopped) and the averaged weights as a diffusers folder `vae/` into `--out`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from distriray.landscapes.pictures import psnr, to_float
from distriray.landscapes.training import dataset
from distriray.landscapes.training.codec import decode_linearly, finish_linear, patch_code, start_linear
from distriray.landscapes.training.common import Average, Checkpoint, cosine, options

VAE_CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 128),
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 2,
    "sample_size": 512,
    "mid_block_add_attention": False,
    "force_upcast": False,
}


def reconstruction_loss(restored: Tensor, pictures: Tensor) -> Tensor:
    """Squared error for PSNR, absolute error of values and of neighbours' differences for crisp edges."""
    error = restored - pictures
    across, down = error.diff(dim=-1), error.diff(dim=-2)
    return error.square().mean() * 8 + error.abs().mean() + 0.5 * (across.abs().mean() + down.abs().mean())


def crops(
    pictures: list[np.ndarray], weights: list[float], rng: np.random.Generator, batch: int, size: int
) -> Tensor:
    """Random crops, (batch, 3, size, size) in [-1, 1], of one bucket's pictures, half of them mirrored."""
    bucket = pictures[rng.choice(len(pictures), p=weights)]
    chosen = []
    for index in rng.integers(0, len(bucket), batch):
        top, left = (int(rng.integers(0, side // 8 - size // 8 + 1)) * 8 for side in bucket.shape[1:3])
        crop = bucket[index, top : top + size, left : left + size]
        chosen.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return to_float(np.stack(chosen))


def train_linear(vae: AutoencoderKL, pictures: list[np.ndarray], steps: int, seed: int) -> None:
    """Fits the decoder's linear path to the linear encoder; cheap, and most of the way."""
    kernel, bias = patch_code(vae)
    optimizer = torch.optim.Adam(vae.decoder.parameters(), lr=2e-3, betas=(0.9, 0.98))
    for step in range(steps):
        rng = np.random.default_rng([seed, 1, step])
        batch = crops(pictures, [1.0], rng, 8, 128).to(vae.device)
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, 2e-3, warmup=20)
        latents = functional.conv2d(batch, kernel, bias, stride=8)
        with torch.autocast(vae.device.type, torch.bfloat16):
            restored = decode_linearly(vae, latents)
        error = restored.float() - batch
        optimizer.zero_grad(set_to_none=True)
        error.square().mean().backward()
        optimizer.step()
        if step % 50 == 49:
            print(
                f"linear {step + 1}: {psnr(batch + error.detach(), batch).mean().item():.2f} dB", flush=True
            )
    finish_linear(vae)


def train(arguments: argparse.Namespace) -> None:
    """The encoder is the best linear code and stays it; the decoder learns all that a linear one cannot."""
    device = torch.device(arguments.device)
    torch.manual_seed(arguments.seed)
    vae = AutoencoderKL(**VAE_CONFIG).to(device, memory_format=torch.channels_last)
    average = Average(vae, 0.99)
    optimizer = torch.optim.AdamW(
        vae.decoder.parameters(), lr=arguments.lr, betas=(0.9, 0.98), weight_decay=1e-4
    )
    checkpoint = Checkpoint(
        arguments.out / "vae.pt", {"model": vae, "average": average, "optimizer": optimizer}
    )
    begun = checkpoint.path.exists()
    start = checkpoint.restore()

    square = [
        pictures for bucket, pictures in dataset.load(arguments.pictures) if bucket.height == bucket.width
    ][:2]
    held_out = np.stack([dataset.BUCKETS[0].held_out(index) for index in range(8)])
    if not begun:
        start_linear(vae, to_float(square[0][:200]))
        vae.encoder.requires_grad_(False)
        train_linear(vae, square[:1], arguments.linear_steps, arguments.seed)
        average.load_state_dict(vae.state_dict())
        print(f"linear: held-out {held_out_psnr(vae, held_out, device):.2f} dB", flush=True)
        checkpoint.save(0)
        export(average.model, held_out, arguments.out / "vae")
    kernel, bias = patch_code(vae)
    began = time.monotonic()
    for step in range(start, arguments.steps):
        rng = np.random.default_rng([arguments.seed, step])
        size, batch = (
            (256, arguments.batch // 4) if rng.random() < arguments.whole else (128, arguments.batch)
        )
        pictures = crops(square, [0.75, 0.25], rng, batch, size).to(device, memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, arguments.steps, arguments.lr, warmup=50)
        latents = functional.conv2d(pictures, kernel, bias, stride=8)
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        deviation = arguments.noise * torch.rand(batch, 1, 1, 1, generator=generator)
        noise = (deviation * torch.randn(latents.shape, generator=generator)).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            restored = vae.decode(latents + noise).sample
        loss = reconstruction_loss(restored.float(), pictures)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 0.5)
        optimizer.step()
        average.update(step + 100)
        if step % 50 == 49 or step + 1 == arguments.steps:
            score = held_out_psnr(average.model, held_out, device)
            pace = (time.monotonic() - began) / (step + 1 - start)
            print(f"{step + 1} loss {loss.item():.4f} held-out {score:.2f} dB {pace:.2f} s/step", flush=True)
            checkpoint.save(step + 1)
            export(average.model, held_out, arguments.out / "vae")


@torch.no_grad()
def held_out_psnr(vae: AutoencoderKL, pictures: np.ndarray, device: torch.device) -> float:
    inputs = to_float(pictures).to(device)
    return psnr(vae(inputs).sample.float(), inputs).mean().item()


@torch.no_grad()
def export(vae: AutoencoderKL, pictures: np.ndarray, folder: Path) -> None:
    """Saves the autoencoder; its `scaling_factor` gives latents a standard deviation of 1."""
    latents = vae.encode(to_float(pictures).to(vae.device)).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    vae.save_pretrained(folder)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument(
        "--steps", type=int, default=2000, help="of the whole decoder, after the linear path's"
    )
    parser.add_argument(
        "--batch", type=int, default=8, help="crops of 128 pixels a step; a quarter for whole pictures"
    )
    parser.add_argument("--whole", type=float, default=0.25, help="share of steps on 256-pixel crops")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument(
        "--noise", type=float, default=0.2, help="largest deviation of the noise that the decoder must bear"
    )
    parser.add_argument("--linear-steps", type=int, default=300)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
