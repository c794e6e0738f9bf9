"""Prompts: captions of held-out scenes, or a user's own."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from distriray.landscapes.captions import Labels
from distriray.landscapes.evaluate import held_out_captions


@dataclass(frozen=True)
class Prompt:
    """A text, the seed of its noise, and which attributes of a landscape it states."""

    text: str
    seed: int
    said: Labels = field(default_factory=dict, hash=False)


def landscape_prompts(count: int, first_seed: int) -> list[Prompt]:
    """Captions of scenes that no training saw."""
    captions = held_out_captions(count)
    return [Prompt(text, first_seed + index, said) for index, (text, said) in enumerate(captions)]


def read_prompts(path: Path, count: int, first_seed: int) -> list[Prompt]:
    """The first `count` prompts of a file: one a line, or COCO's captions (`.json`), the first of each image.

    Raises:
        ValueError: the file holds fewer.
    """
    if path.suffix == ".json":
        first: dict[int, str] = {}
        for annotation in json.loads(path.read_text())["annotations"]:
            first.setdefault(annotation["image_id"], annotation["caption"].strip())
        texts = list(first.values())
    else:
        texts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if len(texts) < count:
        raise ValueError(f"{path} holds {len(texts)} prompts, not {count}; pass --count {len(texts)}")
    return [Prompt(text, first_seed + index) for index, text in enumerate(texts[:count])]
