"""Trains the text encoders to tell which attributes a caption states, and builds their tokenizer.

    python -m distriray.landscapes.training.text_encoders [--steps 350]

Writes `tokenizer/`, `text_encoder/` and `text_encoder_2/` into `--out`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from distriray.landscapes.scene import HELD_OUT_SEED
from distriray.landscapes.training.common import cosine
from distriray.landscapes.training.text import (
    AttributeHeads,
    build_encoders,
    build_tokenizer,
    encode,
    sample_captions,
    split_logits,
    tokenize,
    words,
)


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer(iter(sample_captions(arguments.seed, 4000)[0] + words() * 20))
    first, second = build_encoders(tokenizer)
    heads = AttributeHeads()
    parameters = [p for module in (first, second, heads) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.lr, weight_decay=1e-3)
    for step in range(arguments.steps):
        texts, labels = sample_captions(arguments.seed + 1 + step, arguments.batch)
        ids = tokenize(tokenizer, texts)
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, arguments.steps, arguments.lr, warmup=50)
        loss = torch.zeros(())
        for logits in heads(*encode(first, second, ids), ids, tokenizer.eos_token_id):
            for block, target in zip(split_logits(logits), labels.unbind(1), strict=True):
                loss = loss + functional.cross_entropy(block, target + 1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 99 or step + 1 == arguments.steps:
            print(
                f"{step + 1} loss {loss.item():.3f} {_accuracy(tokenizer, first, second, heads)}", flush=True
            )
    for name, part in (("tokenizer", tokenizer), ("text_encoder", first), ("text_encoder_2", second)):
        part.save_pretrained(arguments.out / name)


@torch.no_grad()
def _accuracy(
    tokenizer: CLIPTokenizer,
    first: CLIPTextModel,
    second: CLIPTextModelWithProjection,
    heads: AttributeHeads,
) -> str:
    texts, labels = sample_captions(0, 256, first_scene=HELD_OUT_SEED)
    ids = tokenize(tokenizer, texts)
    scores = []
    for logits in heads(*encode(first, second, ids), ids, tokenizer.eos_token_id):
        right = [b.argmax(1) == t + 1 for b, t in zip(split_logits(logits), labels.unbind(1), strict=True)]
        scores.append(torch.stack(right).float().mean().item())
    return "attributes read on held-out captions: pooled {:.3f}, tokens {:.3f}".format(*scores)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/landscapes"))
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
