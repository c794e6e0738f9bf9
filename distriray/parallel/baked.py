"""State that captured steps have baked in: all that decides what a network computes, besides its inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from itertools import chain
from operator import eq, is_, itemgetter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from distriray.parallel.layers.bare import has_class_forward, has_compiled_forward

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
# Their attention processors keep what they go by in plain values.
_KNOWN_PROCESSORS = ("diffusers.", "distriray.", "torch.", "peft.")

_call: Any = itemgetter.__call__


class Baked:
    """A network as it is now, to be compared with what it is when a captured step shall stand for it.

    Layers, where their parameters lie, and what is set on a layer or its processor: plain values (scales,
    active adapters, switches) by what they are, whatever else by which object it is. Layers and parameters
    that are taken out of the network stay alive as long as this.

    Args:
        network: what is compared.
        forward: what answered the network's calls before it was in a gang: its class's forward, unless there
            are hooks around that.

    Attributes:
        obstacle: what about the network a graph would pass by, None if nothing.
    """

    def __init__(self, network: nn.Module, forward: Callable[..., Any] | None) -> None:
        self.obstacle = _obstacle(network, forward)
        self._layers = list(network.modules())
        self._types = [type(layer) for layer in self._layers]
        hooks: list[dict[Any, Any]] = [hooks for layer in self._layers[1:] for hooks in _hooks(layer)]
        holders: list[dict[str, Any]] = [
            holder for layer in self._layers for holder in (layer._modules, layer._parameters, layer._buffers)
        ]
        self._held = [holder for holder in holders if holder]
        self._empty = [*hooks, *(holder for holder in holders if not holder)]
        self._contents = list(chain.from_iterable(map(dict.values, self._held)))
        tensors = [content for content in self._contents if isinstance(content, torch.Tensor)]
        self._ordinary = [tensor for tensor in tensors if type(tensor) in (torch.Tensor, nn.Parameter)]
        self._addresses = list(map(torch.Tensor.data_ptr, self._ordinary))
        self._unusual = [tensor for tensor in tensors if type(tensor) not in (torch.Tensor, nn.Parameter)]
        self._signs = list(map(_sign, self._unusual))
        self._plain, self._others = _Values(), _Values()
        self._sized = [*self._held, *map(vars, self._layers)]
        for layer in self._layers:
            # The half of all layers are linear, with nothing set but their shape.
            if type(layer) is not nn.Linear or "forward" in vars(layer):
                self._look_at(vars(layer))
            processor = vars(layer).get("processor")
            if processor is not None and hasattr(processor, "__dict__"):
                self._sized.append(vars(processor))
                self._look_at(vars(processor))
        self._sizes = list(map(len, self._sized))

    def holds(self) -> bool:
        """Whether the network is still as it was.

        Asked in every step, because pipelines change scales in the middle of an image, and hooks move
        weights. So it loops over nothing in Python: that takes a few milliseconds for SDXL.
        """
        return self.stands() and self._plain.hold(eq) and self._others.hold(_are_the_same)

    def stands(self) -> bool:
        """Whether layers and parameters are those that they were, and where they were."""
        return (
            not any(self._empty)
            and list(map(type, self._layers)) == self._types
            and list(map(len, self._sized)) == self._sizes
            and all(map(is_, chain.from_iterable(map(dict.values, self._held)), self._contents))
            and list(map(torch.Tensor.data_ptr, self._ordinary)) == self._addresses
            and list(map(_sign, self._unusual)) == self._signs
        )

    def _look_at(self, attributes: dict[str, Any]) -> None:
        own = {name: value for name, value in attributes.items() if name not in _OF_EVERY_MODULE}
        if list(own) == ["training"]:  # a container
            return
        plain = {name for name, value in own.items() if _is_plain(value)}
        self._plain.add(attributes, {name: copy.deepcopy(own[name]) for name in own if name in plain})
        self._others.add(attributes, {name: own[name] for name in own if name not in plain})


class _Values:
    """Some of the attributes of several objects."""

    def __init__(self) -> None:
        self._attributes: list[dict[str, Any]] = []
        self._getters: list[itemgetter[Any]] = []
        self._values: list[Any] = []

    def add(self, attributes: dict[str, Any], some: dict[str, Any]) -> None:
        """Remember `some` of an object's attributes."""
        if some:
            names = list(some)
            getter = itemgetter(*names, names[0])  # a single name would come without a tuple
            self._attributes.append(attributes)
            self._getters.append(getter)
            self._values.append(getter(some))

    def hold(self, same: Callable[[Any, Any], bool]) -> bool:
        """Whether all are still the same."""
        now = map(_call, self._getters, self._attributes)
        try:
            return all(map(same, now, self._values))
        except KeyError:  # one of them is gone
            return False


def arithmetic() -> tuple[Hashable, ...]:
    """The switches of torch that decide which kernels an operation launches."""
    return (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", None),  # since torch 2.7
        *_tf32(),
    )


def _tf32() -> tuple[Hashable, ...]:
    try:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    except RuntimeError:  # they were set in torch 2.9's way, and may not be read in the other
        convolution: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        return torch.backends.cuda.matmul.fp32_precision, convolution.fp32_precision


def _are_the_same(these: tuple[Any, ...], those: tuple[Any, ...]) -> bool:
    return all(map(is_, these, those)) or all(map(_is_the_same, these, those))


def _is_the_same(one: Any, other: Any) -> bool:
    """Whether two are one, or lists of the same: a call of Qwen-Image 2.1 has its positions in a new one."""
    if type(one) is list and type(other) is list and len(one) == len(other):
        return all(map(is_, one, other))
    return one is other


def _obstacle(network: nn.Module, forward: Callable[..., Any] | None) -> str | None:
    """Code that is not the layers' own, and may do otherwise in another step without being seen."""
    if getattr(forward, "__func__", None) is not type(network).forward:
        return f"something stands in the place of {type(network).__name__}.forward"
    for name, layer in network.named_modules():
        if layer is network:
            continue
        if any(_hooks(layer)):
            return f"layer {name} has a hook"
        if not (has_class_forward(layer) or has_compiled_forward(layer)):
            return f"layer {name} has a hook, or something stands in the place of its forward"
        processor = vars(layer).get("processor")
        if processor is not None and not type(processor).__module__.startswith(_KNOWN_PROCESSORS):
            return f"layer {name} uses a {type(processor).__name__}, which is not known"
    return None


def _hooks(layer: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    return layer._forward_hooks, layer._forward_pre_hooks


def _sign(tensor: torch.Tensor) -> Hashable:
    """Address of a tensor; one that is made of several, as quantized ones are, where these do."""
    if is_traceable_wrapper_subclass(tensor):
        return tuple(_sign(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.data_ptr()


def _is_plain(value: object) -> bool:
    """Whether it is numbers and texts all through."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, tuple | list | set):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
