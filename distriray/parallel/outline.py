"""Outline of a network: which layers it has, and what was hung on them."""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any

from torch import nn


class Outline:
    """A network as it was when it was looked at, to be compared in every step with what it is.

    Layers, their classes, hooks and attention processors, and what stands in the place of a forward; not the
    values of anything.
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
        return [*own, *chain.from_iterable(map(dict.values, self._hung))]
