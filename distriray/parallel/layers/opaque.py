"""Layers' exchanges as an operator of torch, which `torch.compile` calls and does not look into."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch

_LAYERS: WeakValueDictionary[int, Opaque] = WeakValueDictionary()
_numbers = count()


class Opaque(ABC):
    """A layer, or an attention processor, that talks to its peers in `exchanged`, and nowhere else.

    Layers that are alike run the same compiled code, which holds for all values of tensors and for one value
    of everything else. So a layer is named by the value of a tensor.
    """

    @abstractmethod
    def exchanged(self, *inputs: Any) -> torch.Tensor:
        """The result of `exchange`."""

    def exchanged_shape(self, *inputs: Any) -> tuple[int, ...]:
        """The shape of `exchanged(*inputs)`: that of the first input, unless a subclass says otherwise."""
        return tuple(inputs[0].shape)

    def exchange(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        """`exchanged(*inputs)`, of the first input's dtype."""
        if torch.compiler.is_compiling():
            shape = self.exchanged_shape(*inputs)
            output: torch.Tensor = torch.ops.distriray.exchange(_turn, self._number, inputs, shape)
            return output
        return self.exchanged(*inputs)

    def enroll(self) -> None:
        """Let compiled code find this layer."""
        number = next(_numbers)
        self._number = _scalar(number)
        _LAYERS[number] = self


def _scalar(value: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, device="cpu")


# Nothing is written to the turn. The operator says so all the same, to be called in the order of the layers.
_turn = _scalar(0)
_library = torch.library.Library("distriray", "DEF")
_library.define("exchange(Tensor(a!) turn, Tensor layer, Tensor?[] inputs, SymInt[] shape) -> Tensor")


@torch.library.impl(_library, "exchange", "CompositeExplicitAutograd")
def _exchange(turn: torch.Tensor, layer: torch.Tensor, inputs: list[Any], shape: list[int]) -> torch.Tensor:
    output = _LAYERS[int(layer)].exchanged(*inputs)
    if list(output.shape) != list(shape) or output.dtype != inputs[0].dtype:
        raise RuntimeError(
            f"a layer gave {output.dtype} {list(output.shape)}, and the code around it was compiled for "
            f"{inputs[0].dtype} {list(shape)}"
        )
    return output.contiguous(memory_format=_memory_format(inputs[0]))


@torch.library.register_fake("distriray::exchange", lib=_library)
def _exchange_fake(
    turn: torch.Tensor, layer: torch.Tensor, inputs: list[Any], shape: list[int]
) -> torch.Tensor:
    first = inputs[0]
    return torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=_memory_format(first))


def _memory_format(input: torch.Tensor) -> torch.memory_format:
    """Memory format of a layer's output: convolutions and norms keep to their input's."""
    last = input.ndim == 4 and input.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not input.is_contiguous() else torch.contiguous_format
