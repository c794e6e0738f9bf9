"""Trains the attribute checker on drawn scenes.

    python -m distriray.landscapes.training.checker [--steps 500]

Pictures are blurred and noised at random, so that it judges what is shown and not how crisply.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from distriray.landscapes.checker import CHECKER_FILE, Checker, to_input
from distriray.landscapes.training import dataset
from distriray.landscapes.training.common import cosine


def blur_some(inputs: Tensor, rng: np.random.Generator) -> Tensor:
    """Softens a random part of the batch and adds a little noise to all of it."""
    size = int(rng.integers(48, 128))
    soft = functional.interpolate(
        functional.interpolate(inputs, (size, size), mode="area"), inputs.shape[2:], mode="bilinear"
    )
    chosen = torch.from_numpy(rng.random(len(inputs)) < 0.5)[:, None, None, None]
    noise = torch.from_numpy(rng.standard_normal(inputs.shape, dtype=np.float32))
    return torch.where(chosen, soft, inputs) + 0.02 * noise


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    buckets = [
        (bucket, pictures) for bucket, pictures in dataset.load(arguments.pictures) if bucket.count > 500
    ]
    shares = np.array([bucket.count for bucket, _ in buckets]) / sum(bucket.count for bucket, _ in buckets)
    checker = Checker()
    optimizer = torch.optim.AdamW(checker.parameters(), lr=arguments.lr, weight_decay=1e-2)
    for step in range(arguments.steps):
        rng = np.random.default_rng([arguments.seed, 4, step])
        bucket, pictures = buckets[rng.choice(len(buckets), p=shares)]
        indices = np.sort(rng.integers(0, bucket.count, arguments.batch))
        labels = torch.tensor([bucket.scene(int(index)).labels() for index in indices])
        logits = checker(blur_some(to_input(pictures[indices]), rng))
        losses = [
            functional.cross_entropy(block, target, ignore_index=-1)
            for block, target in zip(logits, labels.unbind(1), strict=True)
            if (target >= 0).any()
        ]
        loss = torch.stack(losses).sum()
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, arguments.steps, arguments.lr, warmup=50)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            print(f"{step + 1} loss {loss.item():.3f}", flush=True)
    save_file(
        {name: tensor.half() for name, tensor in checker.state_dict().items() if tensor.is_floating_point()},
        arguments.to,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=Path, default=Path("runs/landscapes/pictures"))
    parser.add_argument("--to", type=Path, default=CHECKER_FILE)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
