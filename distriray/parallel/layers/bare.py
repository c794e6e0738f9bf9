"""Bare layers: nothing is set on them or around them."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn


def has_class_forward(module: nn.Module) -> bool:
    """Whether a module runs the forward of its class: never hooked, or left so by a hook that was removed."""
    own = vars(module).get("forward")
    return own is None or getattr(own, "__func__", None) is type(module).forward


def has_compiled_forward(module: nn.Module) -> bool:
    """Whether a module runs the forward of its class, as torch has compiled it, and nothing around that."""
    own = vars(module).get("forward")
    given = given_to_compiler(own)
    return given is not own and given == MethodType(type(module).forward, module)


def given_to_compiler(function: Any) -> Any:
    """The function that torch compiles when this one is called; this one itself if torch compiles none."""
    while hasattr(function, "_torchdynamo_orig_callable") and _is_of_compiler(function):
        function = function._torchdynamo_orig_callable
    return function


def _is_of_compiler(function: Any) -> bool:
    """Whether torch wrote a function; what wraps it may have a copy of its attributes."""
    origin: str = getattr(function, "__globals__", {}).get("__name__") or ""
    return origin.startswith("torch._dynamo.")


def is_bare(linear: nn.Module, input: torch.Tensor) -> bool:
    """Whether a layer's output is the product of `input` with its weight and nothing else.

    Not so with a bias, an adapter, rounded weights, a hook, or autocast.
    """
    return (
        type(linear) is nn.Linear
        and linear.bias is None
        and type(linear.weight) is nn.Parameter
        and linear.weight.dtype == input.dtype
        and has_class_forward(linear)
        and not (linear._forward_hooks or linear._forward_pre_hooks)
        and not is_autocast_on(input.device)
    )


def without_idle_adapters(linear: Any) -> Any:
    """The layer that LoRAs are around, if none of them is in use; the layer itself if it is not so.

    So a layer that is given nothing by adapters computes the same bits whether any are held or not.
    """
    if type(linear) is not LoraLinear or linear.merged or not has_class_forward(linear):
        return linear
    if linear._forward_hooks or linear._forward_pre_hooks:
        return linear
    return linear if adapters_in_use(linear) else linear.base_layer


def adapters_in_use(layer: LoraLayer) -> tuple[str, ...]:
    """Names of the LoRAs that a layer adds to what it is around, by layers of their own."""
    if layer.disable_adapters or layer.merged:
        return ()
    return tuple(name for name in layer.active_adapters if name in layer.lora_A)


def is_autocast_on(device: torch.device) -> bool:
    """Whether layers cast their inputs on a device; some devices have no such thing."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
