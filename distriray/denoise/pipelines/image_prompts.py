"""Image prompts: the tokens that IP-Adapters attend to beside the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class ImagePrompt(NamedTuple):
    """A picture as an IP-Adapter takes it.

    Attributes:
        name: of the IP-Adapter.
        embeds: of [unconditional, conditional], as the image encoder gives them: (2, 1, channels), or
            (2, 1, tokens, channels).
    """

    name: str
    embeds: torch.Tensor


def embeds_of(prompts: Sequence[ImagePrompt], branches: int, images: int) -> list[torch.Tensor]:
    """What a network takes for each: (branches x images, 1, ...), like its batch."""
    return [prompt.embeds[-branches:].repeat_interleave(images, dim=0) for prompt in prompts]
