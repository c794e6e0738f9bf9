"""Trains an adapter (LoRA) of the built-in model on landscapes in one style.

    python -m distriray.landscapes.training.adapters ink [--steps 900]

Needs nothing but the shipped model; it draws its own pictures first. Resumable: the same command goes on
where the last one stopped, and at the end writes `distriray/landscapes/adapters/<style>.safetensors`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from distriray.landscapes import ADAPTERS_DIR, MODEL_DIR
from distriray.landscapes.training.common import Checkpoint, options, save_whole, steady
from distriray.landscapes.training.dataset import Bucket
from distriray.landscapes.training.denoising import encode_pictures, picture_weights
from distriray.landscapes.training.styles import STYLES
from distriray.landscapes.training.unet import UNetLesson

BUCKETS = (Bucket(256, 256, 1500, 0), Bucket(512, 512, 240, 1_000_000))
SHARES = (0.75, 0.25)
"""How often a step takes a bucket."""

_OF_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
LAYERS = [*_OF_ATTENTION, "conv1", "conv2", "conv_in", "conv_out"]


class Factors:
    """The adapter of a U-Net, as a part of a checkpoint."""

    def __init__(self, unet: UNet2DConditionModel, rank: int) -> None:
        self.unet = unet
        unet.requires_grad_(False)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS, init_lora_weights="gaussian")
        unet.add_adapter(config)
        self.weights = [weight for weight in unet.parameters() if weight.requires_grad]

    def state_dict(self) -> dict[str, Tensor]:
        factors: dict[str, Tensor] = get_peft_model_state_dict(self.unet)
        return factors

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        set_peft_model_state_dict(self.unet, state)


def cache_latents(style: str, path: Path) -> None:
    """Draw every bucket in a style, and keep what the VAE makes of it."""
    vae = AutoencoderKL.from_pretrained(MODEL_DIR / "vae", dtype=torch.float32)
    latents = {}
    for bucket in BUCKETS:
        pictures = np.stack([STYLES[style](bucket.picture(index)) for index in range(bucket.count)])
        latents[bucket.name] = encode_pictures(vae, pictures)
        print(f"{bucket.name}: {bucket.count} pictures", flush=True)
    save_whole({"latents": latents, "weights": picture_weights(vae, latents[BUCKETS[0].name][:16])}, path)


def train(arguments: argparse.Namespace) -> None:
    device, folder = torch.device(arguments.device), arguments.out / "adapters" / arguments.style
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    lesson = UNetLesson(MODEL_DIR, device)
    unet = UNet2DConditionModel.from_pretrained(MODEL_DIR / "unet", dtype=torch.float32).to(device)
    if device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())
    factors = Factors(unet, arguments.rank)
    optimizer = torch.optim.AdamW(factors.weights, betas=(0.9, 0.98), weight_decay=1e-3)
    parts: dict[str, Any] = {"factors": factors, "optimizer": optimizer}
    checkpoint = Checkpoint(folder / "adapter.pt", parts)
    start = checkpoint.restore()
    if not (folder / "latents.pt").exists():
        cache_latents(arguments.style, folder / "latents.pt")
    cached = torch.load(folder / "latents.pt")
    weights = cached["weights"].to(device)
    began, losses = time.monotonic(), []
    for step in range(start, arguments.steps):
        rng = np.random.default_rng([arguments.seed, step])
        bucket = BUCKETS[rng.choice(len(BUCKETS), p=SHARES)]
        count = max(1, round(arguments.batch * 256 * 256 / (bucket.height * bucket.width)))
        indices = rng.integers(0, bucket.count, count)
        clean = cached["latents"][bucket.name][indices].float().to(device)
        loss = lesson.loss(unet, clean, bucket, indices, rng, weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(factors.weights, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = steady(step, arguments.steps, arguments.lr, warmup=20)
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 9:
            pace = (time.monotonic() - began) / (step + 1 - start)
            print(f"{step + 1} loss {np.mean(losses[-10:]):.4f} {pace:.2f} s/step", flush=True)
        if step % 50 == 49 or step + 1 == arguments.steps:
            checkpoint.save(step + 1)
    export(factors, arguments.to / f"{arguments.style}.safetensors")


def export(factors: Factors, path: Path) -> None:
    """Write an adapter as diffusers reads it, in half precision."""
    path.parent.mkdir(parents=True, exist_ok=True)
    StableDiffusionXLPipeline.save_lora_weights(
        path.parent,
        unet_lora_layers={name: weight.half() for name, weight in factors.state_dict().items()},
        weight_name=path.name,
    )


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("style", choices=STYLES)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--rank", type=int, default=6)
    parser.add_argument(
        "--batch", type=int, default=8, help="pictures of 256x256 a step; fewer of the larger ones"
    )
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--to", type=Path, default=ADAPTERS_DIR, help="folder of the file that is written")
    return parser.parse_args(words)


if __name__ == "__main__":
    train(parse())
