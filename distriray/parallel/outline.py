"""Outline of a network: which layers it has, and what was hung on them."""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

_SWITCHES = (
    "padding_mode",
    "s1",  # of FreeU
    "scale",
    "residual_connection",
    "rescale_output_factor",
)
"""Values of layers that have them which decide whether a layer can be cut."""


class Outline:
    """A network as it was when it was looked at, to be compared in every step with what it is.

    Layers, their classes, hooks and attention processors, what stands in the place of a forward, and the
    switches that decide whether they can be cut; no other values.
    """

    def __init__(self, network: nn.Module) -> None:
        self._layers = list(network.modules())
        self._kinds = list(map(type, self._layers))
        self._attributes = list(map(vars, self._layers))
        self._hung: list[dict[Any, Any]] = [
            hung
            for layer in self._layers
            for hung in (layer._modules, layer._forward_hooks, layer._forward_pre_hooks)
        ]
        self._hung += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        self._switches = [(own, name) for own in self._attributes for name in _SWITCHES if name in own]
        self._switches += [(own, "training") for own in self._attributes if "p" in own]  # of dropout
        self._sizes = self._sizes_now()
        self._contents = self._contents_now()

    def holds(self) -> bool:
        """Whether the network is still as it was; it takes about a millisecond for SDXL."""
        return (
            list(map(type, self._layers)) == self._kinds
            and self._sizes_now() == self._sizes
            and all(map(is_, self._contents_now(), self._contents))
        )

    def _sizes_now(self) -> list[int]:
        return list(map(len, chain(self._attributes, self._hung)))

    def _contents_now(self) -> list[Any]:
        own = [attributes.get(name) for attributes in self._attributes for name in ("forward", "processor")]
        switches = [attributes.get(name) for attributes, name in self._switches]
        return [*own, *switches, *chain.from_iterable(map(dict.values, self._hung))]
