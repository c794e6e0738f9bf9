"""Trains the U-Net on latents of drawn scenes and their captions.

    python -m distriray.landscapes.training.unet [--device cuda] [--steps 20000]

Needs what `dataset`, `vae` and `text_encoders` wrote. Resumable (`denoising`).
`python -m distriray.landscapes.training.export` makes the model folder of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from distriray.landscapes.training import dataset
from distriray.landscapes.training.denoising import Lesson, captions, noise_like, parse, train
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


def timesteps(rng: np.random.Generator, count: int, side: float) -> Tensor:
    """Random timesteps; larger pictures, whose neighbours tell more of each other, get noisier ones."""
    lean = 1.0 + 0.6 * max(0.0, np.log2(side / 256))
    return torch.from_numpy((1000 * (1 - rng.uniform(0, 1, count) ** lean)).astype(np.int64)).clamp(0, 999)


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
        texts = captions(bucket, indices, rng)
        fate = rng.uniform(0, 1, len(texts))
        texts = ["" if chance < self.drop / 2 else text for chance, text in zip(fate, texts, strict=True)]
        embeddings, pooled = encode(self.first, self.second, tokenize(self.tokenizer, texts).to(self.device))
        kept = torch.from_numpy((fate < self.drop / 2) | (fate >= self.drop)).float().to(self.device)
        size = [bucket.height, bucket.width]
        time_ids = torch.tensor([size + [0, 0] + size] * len(texts), dtype=torch.float32, device=self.device)
        return embeddings * kept[:, None, None], {"text_embeds": pooled * kept[:, None], "time_ids": time_ids}


class UNetLesson(Lesson):
    """Predicting velocity under a schedule of noise."""

    name = "unet"
    kind = UNet2DConditionModel
    config = UNET_CONFIG
    outer = ("conv_in", "conv_out")
    block = BasicTransformerBlock

    def __init__(self, folder: Path, device: torch.device) -> None:
        super().__init__(folder, device)
        self._conditioning = Conditioning(folder, device)
        self._scheduler = DDIMScheduler(**SCHEDULER_CONFIG)

    def made(self, initial: Path | None) -> Any:
        unet = super().made(initial)
        if self.device.type == "cpu":  # the fused attention's backward pass took a fifth of a step on CPUs
            unet.set_attn_processor(AttnProcessor())
        return unet

    def loss(
        self,
        network: Any,
        clean: Tensor,
        bucket: dataset.Bucket,
        indices: np.ndarray,
        rng: np.random.Generator,
        weights: Tensor,
    ) -> Tensor:
        embeddings, added = self._conditioning(bucket, indices, rng)
        steps = timesteps(rng, len(clean), (bucket.height * bucket.width) ** 0.5).to(self.device)
        noise = noise_like(clean, rng)
        with torch.autocast(self.device.type, torch.bfloat16):
            noisy = self._scheduler.add_noise(clean, noise, steps)
            velocity = network(noisy, steps, encoder_hidden_states=embeddings, added_cond_kwargs=added).sample
        target = self._scheduler.get_velocity(clean, noise, steps)
        signal = self._scheduler.alphas_cumprod[steps.cpu()].to(self.device)
        return velocity_loss(velocity, target, signal, weights)


if __name__ == "__main__":
    train(parse(__doc__), UNetLesson)
