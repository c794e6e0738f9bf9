"""Bare layers: nothing is set on them or around them."""

from __future__ import annotations

import torch
from torch import nn


def has_class_forward(module: nn.Module) -> bool:
    """Whether a module runs the forward of its class: never hooked, or left so by a hook that was removed."""
    own = vars(module).get("forward")
    return own is None or getattr(own, "__func__", None) is type(module).forward


def is_bare(linear: nn.Module, input: torch.Tensor) -> bool:
    """Whether a layer's output is the product of `input` with its weight and nothing else.

    Not so with a bias, an adapter, rounded weights, a hook, or autocast.
    """
    kind = input.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return (
        type(linear) is nn.Linear
        and linear.bias is None
        and type(linear.weight) is nn.Parameter
        and linear.weight.dtype == input.dtype
        and has_class_forward(linear)
        and not (linear._forward_hooks or linear._forward_pre_hooks)
        and not autocast
    )
