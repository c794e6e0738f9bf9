"""Text encoders that stay in the host's memory."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import cpu_offload
from torch import nn


def place_but_for_text(pipeline: Any, device: torch.device) -> Any:
    """The pipeline on `device`, but for its text encoders: each layer of them comes there as it is needed."""
    for name, part in pipeline.components.items():
        if not isinstance(part, nn.Module):
            continue
        if name.startswith("text_encoder"):
            cpu_offload(part, device, offload_buffers=True)
        else:
            part.to(device)
    return pipeline
