"""Common parts of the trainings of denoising networks: latents of drawn scenes, captions, and the loop.

On CPUs one process a core is fastest: `torchrun --nproc-per-node 2 -m` and the module. Resumable: the same
command goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, distributed
from torch.nn import functional

from distriray.arguments import positive_number
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
"""How often a step takes a bucket, unless it is said."""


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


def cache_latents(arguments: argparse.Namespace, buckets: Iterable[dataset.Bucket]) -> None:
    """Makes `latents.pt`, or adds to it: the latents of buckets, and what an error in each channel costs.

    The costs are kept because training the decoder changes them, and a resumed training needs the same.
    """
    path = arguments.out / "latents.pt"
    cached = torch.load(path) if path.exists() else {"latents": {}}
    lacking = [bucket for bucket in buckets if bucket.name not in cached["latents"]]
    if not lacking:
        return
    vae = AutoencoderKL.from_pretrained(arguments.out / "vae")
    for bucket in lacking:
        pictures = dataset.pictures_of(bucket, arguments.pictures)
        cached["latents"][bucket.name] = encode_pictures(vae, pictures)
    if "weights" not in cached:
        first = dataset.pictures_of(dataset.BUCKETS[0], arguments.pictures)
        cached["weights"] = picture_weights(vae, encode_pictures(vae, first[:16]))
    save_whole(cached, path)


@torch.no_grad()
def picture_weights(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Cost in the picture of an error in each latent channel, (C,) float32 with a mean of 1.

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


def captions(bucket: dataset.Bucket, indices: np.ndarray, rng: np.random.Generator) -> list[str]:
    """Captions of scenes, which leave out some of what there is to say."""
    return [caption(bucket.scene(int(index)), rng, keep=float(rng.uniform(0.6, 1.0)))[0] for index in indices]


class Lesson(ABC):
    """A training task: what one kind of network learns from latents and captions.

    Args:
        folder: where the other trainings wrote what it needs.
        device: to compute on.

    Attributes:
        name: of the checkpoint.
        kind, config: of the network.
        outer: how the names of its first and last layers begin.
        block: the class of the blocks that repeat.
    """

    name: ClassVar[str]
    kind: ClassVar[Any]
    config: ClassVar[Mapping[str, Any]]
    outer: ClassVar[tuple[str, ...]]
    block: ClassVar[type[torch.nn.Module]]

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device

    def made(self, initial: Path | None) -> Any:
        """The network, with random weights or those of a folder."""
        network = self.kind(**self.config)
        if initial:
            network.load_state_dict(self.kind.from_pretrained(initial).state_dict())
        return network.to(self.device)

    @abstractmethod
    def loss(
        self,
        network: Any,
        clean: Tensor,
        bucket: dataset.Bucket,
        indices: np.ndarray,
        rng: np.random.Generator,
        weights: Tensor,
    ) -> Tensor:
        """Of one step, from which the gradients follow.

        Args:
            clean: scaled latents, (N, C, h, w) float32.
            indices: of their scenes in the bucket.
            rng: draws all that is random.
            weights: what an error in each channel costs, (C,).
        """


def noise_like(clean: Tensor, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32)).to(clean.device)


def share_gradients(module: torch.nn.Module) -> None:
    """Replaces every process's gradients by their mean, in one message."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view(gradient.shape))


def train(arguments: argparse.Namespace, kind: type[Lesson]) -> None:
    device = torch.device(arguments.device)
    if "WORLD_SIZE" in os.environ:
        distributed.init_process_group("gloo")
    rank, world = (
        (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    )
    torch.manual_seed(arguments.seed)
    lesson = kind(arguments.out, device)
    network = lesson.made(arguments.initial)
    if arguments.compile:
        for module in network.modules():
            if type(module) is lesson.block:
                module.compile()
    average = Average(network, 0.998)
    optimizer = MuonAndAdamW(network, outer=lesson.outer)
    checkpoint = Checkpoint(
        arguments.out / f"{lesson.name}.pt", {"model": network, "average": average, "optimizer": optimizer}
    )
    start = checkpoint.restore()
    shares = {dataset.by_name()[name]: share for name, share in (arguments.shares or SHARES).items()}
    if rank == 0:
        if start:
            print(f"{checkpoint.path} goes on after {start} of {arguments.steps} steps", flush=True)
        cache_latents(arguments, shares)
    if world > 1:
        distributed.barrier()
    cached = torch.load(arguments.out / "latents.pt")
    buckets = [(bucket, cached["latents"][bucket.name]) for bucket in shares]
    weights = cached["weights"].to(device)
    often = np.array([*shares.values()]) / sum(shares.values())
    began, losses = time.monotonic(), []
    for step in range(start, arguments.steps):
        rng = np.random.default_rng([arguments.seed, step, rank])
        bucket, latents = buckets[rng.choice(len(buckets), p=often)]
        count = max(1, round(arguments.batch * 256 * 256 / (bucket.height * bucket.width)))
        indices = rng.integers(0, bucket.count, count)
        loss = lesson.loss(network, latents[indices].float().to(device), bucket, indices, rng, weights)
        network.zero_grad(set_to_none=True)
        loss.backward()
        if world > 1:
            share_gradients(network)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step(steady(step, arguments.steps, arguments.lr, warmup=100))
        average.update(step)
        losses.append(loss.item())
        if rank == 0 and step % 10 == 9:
            pace = (time.monotonic() - began) / (step + 1 - start)
            print(f"{step + 1} loss {np.mean(losses[-10:]):.4f} {pace:.2f} s/step", flush=True)
        if rank == 0 and (step % 50 == 49 or step + 1 == arguments.steps):
            checkpoint.save(step + 1)


def shares_of(words: str) -> dict[str, float]:
    """Shares of buckets by their names, of words such as 128x128=3,256x256=1."""
    shares = {name: positive_number(share) for name, share in (word.split("=") for word in words.split(","))}
    if unknown := shares.keys() - dataset.by_name():
        known = ", ".join(dataset.by_name())
        raise argparse.ArgumentTypeError(f"no pictures of {', '.join(sorted(unknown))}; there are {known}")
    return shares


def parse(description: str | None, words: list[str] | None = None) -> argparse.Namespace:
    parser = options(description)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument(
        "--initial",
        type=Path,
        help="folder of a network to begin with in place of random weights; not to resume",
    )
    parser.add_argument(
        "--batch", type=int, default=12, help="pictures of 256x256 a step; fewer of the larger ones"
    )
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument(
        "--shares",
        type=shares_of,
        help="how often a step takes which size, such as 128x128=3,256x256=1; those alone",
    )
    parser.add_argument("--compile", action="store_true", help="compile the blocks; CPUs want g++ for it")
    return parser.parse_args(words)
