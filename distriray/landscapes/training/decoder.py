"""Trains the decoder on latents as the U-Net makes them, against a critic that knows drawn pictures.

    python -m distriray.landscapes.training.decoder [--device cuda] [--steps 4000]

Needs what `dataset`, `vae`, `text_encoders` and `unet` wrote; changes `vae/`, whose encoder stays as
it is. A decoder that has seen exact latents alone shows every error of the U-Net as a ragged edge or a
speckle, and one that is taught by distances alone blurs where it is not sure. So drawn pictures are noised
part of the way and denoised by the pipeline (SDEdit, Meng et al., ICLR 2022), which gives the U-Net's own
errors beside the picture that should have come out; and a patch critic (Isola et al., CVPR 2017) asks for
edges as they are drawn. Resumable: the same command goes on where the last one stopped. With another
U-Net or other options, delete `rough/` and `decoder.pt`, which begins anew.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLImg2ImgPipeline
from torch import Tensor, nn
from torch.nn import functional

from distriray.landscapes.captions import caption
from distriray.landscapes.pictures import to_float
from distriray.landscapes.training import dataset
from distriray.landscapes.training.codec import patch_code
from distriray.landscapes.training.common import (
    Average,
    Checkpoint,
    MuonAndAdamW,
    options,
    save_whole,
    steady,
)
from distriray.landscapes.training.export import assemble
from distriray.landscapes.training.vae import held_out_psnr, reconstruction_loss

CHUNK = 8


class Critic(nn.Module):
    """Scores patches of a picture of any size: high for drawn ones, low for decoded ones."""

    def __init__(self) -> None:
        super().__init__()
        layers = []
        for before, after in ((6, 32), (32, 64), (64, 128)):
            layers.append([nn.Conv2d(before, after, 4, stride=2, padding=1), nn.GroupNorm(8, after)])
        layers.append([nn.Conv2d(128, 128, 3, padding=1)])
        self.layers = nn.ModuleList(nn.Sequential(*layer, nn.LeakyReLU(0.2)) for layer in layers)
        self.score = nn.Conv2d(128, 1, 3, padding=1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Scores, (N, 1, H/8, W/8), and what each layer saw, of pictures, (N, 3, H, W) in [-1, 1].

        It is shown the fine part of a picture alone as well: from the whole it learnt nothing in 200 steps.
        """
        coarse = functional.interpolate(functional.avg_pool2d(pictures, 4), scale_factor=4, mode="bilinear")
        features, seen = torch.cat([pictures, 8 * (pictures - coarse)], dim=1), []
        for layer in self.layers:
            features = layer(features)
            seen.append(features)
        return self.score(features), seen


def rough_latents(arguments: argparse.Namespace, bucket: dataset.Bucket, pictures: np.ndarray) -> Tensor:
    """Latents of the bucket's first pictures, noised and denoised: (count, C, H/8, W/8) float16, scaled.

    Chunk by chunk, each with a strength of its own, kept in `rough/`.
    """
    count = min(bucket.count, arguments.rough * 256 * 256 // (bucket.height * bucket.width)) // CHUNK * CHUNK
    folder = arguments.out / "rough"
    folder.mkdir(parents=True, exist_ok=True)
    paths = {at: folder / f"{bucket.name}-{at:05}.pt" for at in range(0, count, CHUNK)}
    missing = [at for at, path in paths.items() if not path.exists()]
    if missing:
        pipeline = StableDiffusionXLImg2ImgPipeline(**assemble(arguments.out).components)
        pipeline.to(arguments.device).set_progress_bar_config(disable=True)
    for at in missing:
        rng = np.random.default_rng([arguments.seed, 5, bucket.first_seed, at])
        chunk = range(at, at + CHUNK)
        with torch.autocast(pipeline.device.type, torch.bfloat16):
            made = pipeline(
                [caption(bucket.scene(index), rng, keep=1.0)[0] for index in chunk],
                image=to_float(pictures[at : at + CHUNK]) / 2 + 0.5,
                strength=float(rng.uniform(0.08, arguments.strength)),
                num_inference_steps=25,
                guidance_scale=4.0,
                generator=[torch.Generator().manual_seed(int(rng.integers(2**63))) for _ in chunk],
                output_type="latent",
            ).images
        save_whole(made.half().cpu(), paths[at])
    return torch.cat([torch.load(path) for path in paths.values()])


class Samples:
    """Crops of pictures with exact or rough latents."""

    def __init__(self, arguments: argparse.Namespace, vae: AutoencoderKL) -> None:
        self.arguments = arguments
        self.kernel, self.bias = (part.cpu() for part in patch_code(vae))
        self.buckets = []
        for bucket, pictures in dataset.load(arguments.pictures):
            if bucket.height == bucket.width and bucket.height <= 512:
                rough = rough_latents(arguments, bucket, pictures).float() / vae.config.scaling_factor
                self.buckets.append((pictures, rough))

    def __call__(self, rng: np.random.Generator, batch: int, size: int) -> tuple[Tensor, Tensor]:
        """Unscaled latents, (batch, C, size/8, size/8), and pictures, (batch, 3, size, size) in [-1, 1]."""
        pictures, rough = self.buckets[rng.choice(len(self.buckets), p=[0.75, 0.25])]
        exact = rng.random(batch) < self.arguments.exact
        chosen, latents = [], []
        for alone in exact:
            index = int(rng.integers(0, len(pictures) if alone else len(rough)))
            top, left = (int(rng.integers(0, (side - size) // 8 + 1)) for side in pictures.shape[1:3])
            crop = pictures[index, 8 * top : 8 * top + size, 8 * left : 8 * left + size]
            chosen.append(to_float(crop[None]))
            if alone:
                latent = functional.conv2d(chosen[-1], self.kernel, self.bias, stride=8)
                noise = torch.from_numpy(rng.standard_normal(latent.shape, dtype=np.float32))
                latents.append(latent + self.arguments.noise * rng.random() * noise)
            else:
                latents.append(rough[index, :, top : top + size // 8, left : left + size // 8][None])
        device = self.arguments.device
        return torch.cat(latents).to(device), torch.cat(chosen).to(device)


def critic_loss(critic: Critic, drawn: Tensor, decoded: Tensor) -> Tensor:
    """The hinge loss: drawn pictures should score above 1, decoded ones below -1."""
    return (1 - critic(drawn)[0]).relu().mean() + (1 + critic(decoded)[0]).relu().mean()


def picture_gradient(critic: Critic, drawn: Tensor, decoded: Tensor, share: float) -> tuple[Tensor, float]:
    """Gradient of the loss by the decoded pictures, (N, 3, H, W), and the reconstruction's part of it.

    The critic has two parts, its score and the distance of what its layers see (Wang et al., CVPR 2018). Each
    is as strong as `share` of the reconstruction's, as in VQGAN (Esser et al., CVPR 2021).
    """
    decoded = decoded.detach().float().requires_grad_()
    reconstruction = reconstruction_loss(decoded, drawn)
    with torch.no_grad():
        _, expected = critic(drawn)
    score, seen = critic(decoded)
    matching = sum((one - other).abs().mean() for one, other in zip(seen, expected, strict=True))
    (exact,) = torch.autograd.grad(reconstruction, decoded)
    total = exact
    for judgement in (-score.mean(), matching):
        (asked,) = torch.autograd.grad(judgement, decoded, retain_graph=True)
        total = total + share * exact.norm() / asked.norm().clamp(min=1e-12) * asked
    return total, reconstruction.item()


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    vae = AutoencoderKL.from_pretrained(arguments.out / "vae").to(arguments.device)
    vae.encoder.requires_grad_(False)
    critic = Critic().to(arguments.device)
    average = Average(vae, 0.995)
    optimizer = MuonAndAdamW(vae.decoder, outer=("conv_in", "conv_out"))
    critic_optimizer = MuonAndAdamW(critic, outer=("layers.0", "score"))
    checkpoint = Checkpoint(
        arguments.out / "decoder.pt",
        {
            "model": vae,
            "average": average,
            "optimizer": optimizer,
            "critic": critic,
            "critic_optimizer": critic_optimizer,
        },
    )
    start = checkpoint.restore()
    if start:
        print(f"{checkpoint.path} goes on after {start} of {arguments.steps} steps", flush=True)
    samples = Samples(arguments, vae)
    held_out = np.stack([dataset.BUCKETS[0].held_out(index) for index in range(8)])
    began, losses = time.monotonic(), []
    for step in range(start, arguments.steps):
        rng = np.random.default_rng([arguments.seed, 6, step])
        size, batch = (256, arguments.batch // 4) if rng.random() < 0.25 else (128, arguments.batch)
        latents, pictures = samples(rng, batch, size)
        with torch.autocast(pictures.device.type, torch.bfloat16):
            # Channels-last latents take a fifth off the time on CPUs, though the weights lie otherwise.
            decoded = vae.decode(latents.contiguous(memory_format=torch.channels_last)).sample
            asked, loss = picture_gradient(
                critic, pictures, decoded, arguments.share * min(1, step / max(1, arguments.alone))
            )
        vae.zero_grad(set_to_none=True)
        decoded.backward(asked.to(decoded.dtype))
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 0.5)
        rate = steady(step, arguments.steps, arguments.lr, warmup=50)
        optimizer.step(rate)
        average.update(step + 100)
        with torch.autocast(pictures.device.type, torch.bfloat16):
            told = critic_loss(critic, pictures, decoded.detach().float())
        critic.zero_grad(set_to_none=True)
        told.backward()
        critic_optimizer.step(rate)
        losses.append((loss, told.item()))
        if step % 100 == 99 or step + 1 == arguments.steps:
            score = held_out_psnr(average.model, held_out, vae.device)
            pace = (time.monotonic() - began) / (step + 1 - start)
            mean = np.mean(losses[-100:], axis=0)
            told_so_far = f"loss {mean[0]:.4f} critic {mean[1]:.3f} held-out {score:.2f} dB"
            print(f"{step + 1} {told_so_far} {pace:.2f} s/step", flush=True)
            checkpoint.save(step + 1)
    vae.load_state_dict(average.state_dict())
    vae.save_pretrained(arguments.out / "vae")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument(
        "--batch", type=int, default=8, help="crops of 128 pixels a step; a quarter for whole pictures"
    )
    parser.add_argument(
        "--rough", type=int, default=1200, help="pictures of 256x256 to make anew; fewer larger"
    )
    parser.add_argument(
        "--strength", type=float, default=0.5, help="largest share of the steps they go through"
    )
    parser.add_argument("--exact", type=float, default=0.35, help="share of crops with exact latents")
    parser.add_argument(
        "--noise", type=float, default=0.1, help="largest deviation of noise on exact latents"
    )
    parser.add_argument("--share", type=float, default=0.5, help="the critic's strength beside the pictures'")
    parser.add_argument(
        "--alone", type=int, default=500, help="steps until the critic has its whole strength"
    )
    parser.add_argument("--lr", type=float, default=4e-4)
    arguments = parser.parse_args(words)
    if arguments.batch < 4:
        parser.error(f"--batch {arguments.batch} leaves no whole picture; use 4 or more")
    if arguments.rough < 4 * CHUNK:
        parser.error(f"--rough {arguments.rough} makes no picture of 512x512; use {4 * CHUNK} or more")
    return arguments


if __name__ == "__main__":
    train(parse())
