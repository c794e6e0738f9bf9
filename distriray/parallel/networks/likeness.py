"""What of a network decides the picture besides its inputs, in a form in which it is compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import nn

_OF_ADAPTERS = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")


@torch.no_grad()
def weights_of(network: nn.Module) -> list[torch.Tensor]:
    """One number of every parameter, those of adapters too: an adapter that was merged has changed them all.

    Not of those that are elsewhere (on the meta device), or that are made of several tensors.
    """
    numbers = defaultdict(list)
    for weight in network.parameters():
        if type(weight) is nn.Parameter and weight.numel() and weight.device.type != "meta":
            number = weight[(-1,) * weight.ndim]
            if weight.dtype.itemsize == 1:
                number = number.view(torch.uint8)  # few operations know such small floats
            numbers[number.dtype, number.device].append(number)
    return [torch.stack(some) for some in numbers.values()]


def adapters_of(network: nn.Module) -> str:
    """The adapters of every layer that has some: which are active or merged, and their scales."""
    found = []
    for name, layer in network.named_modules():
        if "base_layer" in layer._modules:
            found.append((name, *(_plain(getattr(layer, of, None)) for of in _OF_ADAPTERS)))
    return repr(found)


def processors_of(network: nn.Module) -> str:
    """The classes of all attention processors, and the scales that they keep (of image prompts)."""
    holders = [holder for layer in network.modules() for holder in (vars(layer), layer._modules)]
    processors = [holder["processor"] for holder in holders if "processor" in holder]
    return repr([(type(p).__name__, _plain(getattr(p, "scale", None))) for p in processors])


def signs_of(layers: Iterable[nn.Module]) -> Hashable:
    """Where the weights of layers lie, how often they were written, and which adapters count how much."""
    signs: list[Hashable] = []
    for layer in layers:
        for weight in layer._parameters.values():
            if weight is not None:
                signs.append((weight.data_ptr(), None if weight.is_inference() else weight._version))
        if "base_layer" in layer._modules:
            signs += [repr(getattr(layer, of, None)) for of in _OF_ADAPTERS]
    return tuple(signs)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(value[name]) for name in sorted(value)}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else str(value)
