"""Likeness of calls of networks: all that decides the picture, in a form that ranks compare."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from distriray.parallel.agreement import Compared, described
from distriray.parallel.networks.base import Call
from distriray.parallel.networks.controls import UsedControl

_OF_ADAPTERS = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")


def likeness_of(network: nn.Module, call: Call, controls: Sequence[UsedControl]) -> Compared:
    """What ranks compare of a call of any network; families add what else theirs have.

    Args:
        controls: the ControlNets that the call names.
    """
    timestep = call.timestep
    return Compared(
        {
            **described(call.sample),
            "text batch": call.text.shape[0],
            "text tokens": call.text.shape[1],
            "scale of adapters": (call.text_scale or {}).get("scale"),
        },
        near={
            "latents": call.sample,
            "prompt embeddings": call.text,
            "pictures of ControlNets": [control.picture for control in controls],
        },
        equal={
            "timesteps": timestep if isinstance(timestep, torch.Tensor) and timestep.ndim else None,
            "weights": weights_of(network),
            "weights of ControlNets": [each for control in controls for each in weights_of(control.network)],
        },
        texts={
            "guidance branch": str(call.branch),
            "ControlNets, or their scales": repr([(each.name, each.scale, each.mode) for each in controls]),
            "adapters, their scales, or which are active": adapters_of(network),
            "attention processors, or their scales": processors_of(network),
        },
    )


@torch.no_grad()
def weights_of(network: nn.Module) -> list[torch.Tensor]:
    """One number of every parameter, those of adapters in use too: one that was merged has changed them all.

    Not of those that are elsewhere (on the meta device), or that are made of several tensors.
    """
    numbers = defaultdict(list)
    idle = _idle_weights(network)
    # By their names, as ranks may have loaded adapters in any order, or none yet.
    named = ((name.replace(".base_layer", ""), weight) for name, weight in network.named_parameters())
    for _, weight in sorted(named, key=itemgetter(0)):
        if (
            type(weight) is nn.Parameter
            and weight.numel()
            and weight.device.type != "meta"
            and id(weight) not in idle
        ):
            number = weight[(-1,) * weight.ndim]
            if weight.dtype.itemsize == 1:
                number = number.view(torch.uint8)  # few operations know such small floats
            numbers[number.dtype, number.device].append(number)
    return [torch.stack(some) for some in numbers.values()]


def adapters_of(network: nn.Module) -> str:
    """The adapters of every layer that uses or has merged some: which, in order, and their scales."""
    found = []
    for name, layer in network.named_modules():
        if "base_layer" in layer._modules:
            used, merged = _used_adapters(layer), getattr(layer, "merged_adapters", [])
            if used or merged:
                scales = getattr(layer, "scaling", {})
                found.append((name, [(each, _plain(scales.get(each))) for each in used], _plain(merged)))
    return repr(found)


def _used_adapters(layer: Any) -> list[str]:
    if getattr(layer, "disable_adapters", False):
        return []
    there = _by_adapter(layer)
    return [each for each in getattr(layer, "active_adapters", ()) if each in there]


def _by_adapter(layer: Any) -> dict[str, list[Any]]:
    """Modules and parameters that PEFT keeps for each adapter of a layer."""
    kept = defaultdict(list)
    for kind in getattr(layer, "adapter_layer_names", ()):
        for adapter, its in getattr(layer, kind, {}).items():
            kept[adapter].append(its)
    return kept


def _idle_weights(network: nn.Module) -> set[int]:
    """Identities of the weights of adapters that are held and not used, which ranks may have or not."""
    idle: set[int] = set()
    for layer in network.modules():
        if "base_layer" in layer._modules:
            used = _used_adapters(layer)
            for adapter, kept in _by_adapter(layer).items():
                if adapter not in used:
                    for its in kept:
                        idle.update(map(id, its.parameters() if isinstance(its, nn.Module) else [its]))
    return idle


def processors_of(network: nn.Module) -> str:
    """The classes of all attention processors, and the scales that they keep (of image prompts)."""
    holders = [holder for layer in network.modules() for holder in (vars(layer), layer._modules)]
    processors = [holder["processor"] for holder in holders if "processor" in holder]
    return repr([(type(p).__name__, _plain(getattr(p, "scale", None))) for p in processors])


def signs_of(layers: Iterable[nn.Module]) -> Hashable:
    """Signs of layers' weights: where they lie, how often they were written, how much adapters count."""
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
