"""What can be known of a model before any worker has loaded it."""

from __future__ import annotations

import json
from pathlib import Path

from distriray.errors import ModelNotFound
from distriray.models import BUILTIN, ModelSpec, locate


def size_of(spec: ModelSpec) -> tuple[int, int] | None:
    """The default (height, width) in pixels of a model whose folder this machine has; None otherwise."""
    if not spec.name.startswith(BUILTIN) and not Path(spec.name).expanduser().is_dir():
        return None
    try:
        folder = locate(spec)
    except ModelNotFound:
        return None
    sample = json.loads((folder / "unet" / "config.json").read_text())["sample_size"]
    levels = len(json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"])
    height, width = (sample, sample) if isinstance(sample, int) else sample
    scale = 2 ** (levels - 1)
    return height * scale, width * scale
