"""Placement of a pipeline's weights, and whether they fit there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import cpu_offload
from torch import nn

from distriray.errors import UnsupportedModel


def place(pipeline: Any, device: torch.device, *, offload_text: bool) -> Any:
    """The pipeline on `device`.

    Args:
        offload_text: leave text encoders in the host's memory: each layer of them comes as it is needed.

    Raises:
        UnsupportedModel: it does not fit into what the device has free; nothing was moved.
    """
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    away = {name: part for name, part in modules.items() if offload_text and name.startswith("text_encoder")}
    check_fit({name: part for name, part in modules.items() if name not in away}, device)
    for part in away.values():
        cpu_offload(part, device, offload_buffers=True)
    if not away:
        return pipeline.to(device)
    for name in modules.keys() - away.keys():
        modules[name].to(device)
    return pipeline


def check_fit(modules: dict[str, nn.Module], device: torch.device) -> None:
    """Raise `UnsupportedModel`, with the bytes, where these weights are more than a GPU has free."""
    free = free_bytes(device)
    if free is None:
        return
    sizes = {name: sum(map(_stored, _tensors(module))) for name, module in modules.items()}
    if sum(sizes.values()) > free:
        raise UnsupportedModel(
            f"the weights need {_told(sizes)} where {device} has {free / 1e9:.1f} GB free; "
            "`offload_text` and `quantize` need less"
        )


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU, in bytes; None of a CPU, whose memory is everybody's and may be swapped."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def told_beside(pipeline: Any, device: torch.device, free: int) -> str:
    """Words of an error for the bytes that a device has free with a pipeline in place."""
    sizes = {
        name: sum(_stored(tensor) for tensor in _tensors(part) if tensor.device.type == device.type)
        for name, part in pipeline.components.items()
        if isinstance(part, nn.Module)
    }
    there = {name: nbytes for name, nbytes in sizes.items() if nbytes}
    return f"{device} has {free / 1e9:.1f} GB free beside weights of {_told(there)}"


def _told(sizes: dict[str, int]) -> str:
    parts = ", ".join(f"{name} {nbytes / 1e9:.1f}" for name, nbytes in sizes.items())
    return f"{sum(sizes.values()) / 1e9:.1f} GB ({parts})"


def _tensors(module: nn.Module) -> Iterable[torch.Tensor]:
    return *module.parameters(), *module.buffers()


def _stored(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; of a quantized one, of the numbers that it is kept as."""
    if type(tensor.data).__torch_dispatch__ is torch.Tensor.__torch_dispatch__:
        return tensor.nbytes
    names: Iterable[str] = tensor.data.__tensor_flatten__()[0]  # type: ignore[attr-defined]
    return sum(_stored(getattr(tensor.data, name)) for name in names)
