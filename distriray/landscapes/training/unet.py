"""Trains the U-Net on latents of drawn scenes and their captions.

    python -m distriray.landscapes.training.unet [--device cuda] [--steps 20000]

Needs what `dataset`, `vae` and `text_encoders` wrote. On CPUs one process a core is fastest:
`torchrun --nproc-per-node 2 -m distriray.landscapes.training.unet`. Resumable: the same command goes on where
the last one stopped. `python -m distriray.landscapes.training.export` makes the model folder of it.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, distributed
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

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
from distriray.landscapes.training.text import POOLED, WIDTH, encode, tokenize

UNET_CONFIG = {
    "sample_size": 64,
    "in_channels": 8,
    "out_channels": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (48, 96, 160),
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "attention_head_dim": (2, 3, 5),
    "norm_num_groups": 16,
    "cross_attention_dim": 2 * WIDTH,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 6 * 32 + POOLED,
}
SCHEDULER_CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "clip_sample": False,
}
SHARES = {
    "256x256": 0.27,
    "512x512": 0.30,
    "256x384": 0.04,
    "384x256": 0.04,
    "384x512": 0.03,
    "512x384": 0.03,
    "768x768": 0.08,
    "1024x1024": 0.15,
    "512x768": 0.03,
    "768x512": 0.03,
}
"""How often a step takes a bucket."""


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: np.ndarray, batch: int = 64) -> Tensor:
    """Scaled latents, (N, C, H/8, W/8) float16."""
    kernel, bias = patch_code(vae)
    scale = vae.config.scaling_factor
    return torch.cat(
        [
            functional.conv2d(
                to_float(pictures[at : at + batch]), kernel * scale, bias * scale, stride=8
            ).half()
            for at in range(0, len(pictures), batch)
        ]
    )


def cache_latents(arguments: argparse.Namespace) -> None:
    """Makes `latents.pt`: the latents of every bucket, and what an error in each channel of them costs.

    The costs are kept because training the decoder changes them, and a resumed training needs the same.
    """
    vae = AutoencoderKL.from_pretrained(arguments.out / "vae")
    latents = {
        bucket.name: encode_pictures(vae, pictures) for bucket, pictures in dataset.load(arguments.pictures)
    }
    weights = picture_weights(vae, latents[dataset.BUCKETS[0].name][:16])
    save_whole({"latents": latents, "weights": weights}, arguments.out / "latents.pt")


def timesteps(rng: np.random.Generator, count: int, side: float) -> Tensor:
    """Random timesteps; larger pictures, whose neighbours tell more of each other, get noisier ones."""
    lean = 1.0 + 0.6 * max(0.0, np.log2(side / 256))
    return torch.from_numpy((1000 * (1 - rng.uniform(0, 1, count) ** lean)).astype(np.int64)).clamp(0, 999)


@torch.no_grad()
def picture_weights(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """What an error in each latent channel costs in the picture, (C,) float32 with a mean of 1.

    Measured: how a little noise in one channel of scaled `latents`, (N, C, h, w), changes the pictures.
    """
    clean = latents.float() / vae.config.scaling_factor
    picture = vae.decode(clean).sample
    noise = 0.1 * torch.randn(clean[:, 0].shape, generator=torch.Generator().manual_seed(0))
    cost = torch.empty(clean.shape[1])
    for channel in range(len(cost)):
        noisy = clean.clone()
        noisy[:, channel] += noise / vae.config.scaling_factor
        cost[channel] = (vae.decode(noisy).sample - picture).square().mean()
    return cost / cost.mean()


def velocity_loss(
    velocity: Tensor, target: Tensor, signal: Tensor, weights: Tensor, gamma: float = 5.0
) -> Tensor:
    """Mean squared error of (N, C, H, W) in the picture's units; nearly clean timesteps count less.

    Unweighted, three quarters of the loss were in fine channels that little predicts. Where the signal has
    more than 1 - 1/gamma of the variance, `signal` (N,), an error of velocity shows little in the picture:
    its weight is bounded as in Min-SNR (Hang et al., ICCV 2023).
    """
    error = (velocity.float() - target).square().mean(dim=(2, 3)) @ weights / len(weights)
    return (error * (gamma * (1 - signal)).clamp(max=1)).mean()


class Conditioning:
    """Captions to what the U-Net takes; with a chance of `drop` no caption at all, for guidance."""

    def __init__(self, folder: Path, device: torch.device, drop: float = 0.1) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.first = CLIPTextModel.from_pretrained(folder / "text_encoder").to(device).eval()
        self.second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2").to(device).eval()
        self.device, self.drop = device, drop

    @torch.no_grad()
    def __call__(
        self, bucket: dataset.Bucket, indices: np.ndarray, rng: np.random.Generator
    ) -> tuple[Tensor, dict]:
        """Embeddings and `added_cond_kwargs`; no caption is zeros at times and "" at times, as in SDXL."""
        texts = [
            caption(bucket.scene(int(index)), rng, keep=float(rng.uniform(0.6, 1.0)))[0] for index in indices
        ]
        fate = rng.uniform(0, 1, len(texts))
        texts = ["" if chance < self.drop / 2 else text for chance, text in zip(fate, texts, strict=True)]
        embeddings, pooled = encode(self.first, self.second, tokenize(self.tokenizer, texts).to(self.device))
        kept = torch.from_numpy((fate < self.drop / 2) | (fate >= self.drop)).float().to(self.device)
        size = [bucket.height, bucket.width]
        time_ids = torch.tensor([size + [0, 0] + size] * len(texts), dtype=torch.float32, device=self.device)
        return embeddings * kept[:, None, None], {"text_embeds": pooled * kept[:, None], "time_ids": time_ids}


def share_gradients(module: torch.nn.Module) -> None:
    """Replaces every process's gradients by their mean, in one message."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view(gradient.shape))


def train(arguments: argparse.Namespace) -> None:
    device = torch.device(arguments.device)
    if "WORLD_SIZE" in os.environ:
        distributed.init_process_group("gloo")
    rank, world = (
        (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    )
    torch.manual_seed(arguments.seed)
    unet = UNet2DConditionModel(**UNET_CONFIG)
    if arguments.initial:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(arguments.initial).state_dict())
    unet.to(device)
    if device.type == "cpu":  # the fused attention's backward pass took a fifth of a step on CPUs
        unet.set_attn_processor(AttnProcessor())
    average = Average(unet, 0.998)
    optimizer = MuonAndAdamW(unet, outer=("conv_in", "conv_out"))
    checkpoint = Checkpoint(
        arguments.out / "unet.pt", {"model": unet, "average": average, "optimizer": optimizer}
    )
    start = checkpoint.restore()
    if rank == 0:
        if start:
            print(f"{checkpoint.path} goes on after {start} of {arguments.steps} steps", flush=True)
        if not (arguments.out / "latents.pt").exists():
            cache_latents(arguments)
    if world > 1:
        distributed.barrier()
    cached = torch.load(arguments.out / "latents.pt")
    buckets = [(bucket, cached["latents"][bucket.name]) for bucket in dataset.BUCKETS]
    weights = cached["weights"].to(device)
    shares = [SHARES[bucket.name] for bucket, _ in buckets]
    conditioning = Conditioning(arguments.out, device)
    scheduler = DDIMScheduler(**SCHEDULER_CONFIG)
    began, losses = time.monotonic(), []
    for step in range(start, arguments.steps):
        rng = np.random.default_rng([arguments.seed, step, rank])
        bucket, latents = buckets[rng.choice(len(buckets), p=shares)]
        count = max(1, round(arguments.batch * 256 * 256 / (bucket.height * bucket.width)))
        indices = rng.integers(0, bucket.count, count)
        clean = latents[indices].float().to(device)
        embeddings, added = conditioning(bucket, indices, rng)
        steps = timesteps(rng, count, (bucket.height * bucket.width) ** 0.5).to(device)
        noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32)).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            noisy = scheduler.add_noise(clean, noise, steps)
            velocity = unet(noisy, steps, encoder_hidden_states=embeddings, added_cond_kwargs=added).sample
        target = scheduler.get_velocity(clean, noise, steps)
        loss = velocity_loss(velocity, target, scheduler.alphas_cumprod[steps.cpu()].to(device), weights)
        unet.zero_grad(set_to_none=True)
        loss.backward()
        if world > 1:
            share_gradients(unet)
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step(steady(step, arguments.steps, arguments.lr, warmup=100))
        average.update(step)
        losses.append(loss.item())
        if rank == 0 and step % 10 == 9:
            pace = (time.monotonic() - began) / (step + 1 - start)
            print(f"{step + 1} loss {np.mean(losses[-10:]):.4f} {pace:.2f} s/step", flush=True)
        if rank == 0 and (step % 50 == 49 or step + 1 == arguments.steps):
            checkpoint.save(step + 1)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument(
        "--initial",
        type=Path,
        help="folder of a U-Net to begin with in place of random weights; not to resume",
    )
    parser.add_argument(
        "--batch", type=int, default=12, help="pictures of 256x256 a step; fewer of the larger ones"
    )
    parser.add_argument("--lr", type=float, default=1.2e-3)
    return parser.parse_args(words)


if __name__ == "__main__":
    train(parse())
