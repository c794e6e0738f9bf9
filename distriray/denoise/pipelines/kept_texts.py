"""What text encoders made of the texts that were read last."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

MOST_BYTES = 256 * 2**20
"""Of the host's memory, for one model: sixteen prompts of FLUX.2 dev."""

_PLAIN = str, int, float, type(None), torch.device, torch.dtype


class _Read(NamedTuple):
    """A result: its leaves, tensors on the host, where each was, the structure they are in, and bytes."""

    leaves: list[Any]
    devices: list[torch.device | None]
    structure: pytree.TreeSpec
    nbytes: int

    def there(self) -> Any:
        """A copy, where the original was."""
        pairs = zip(self.leaves, self.devices, strict=True)
        leaves = [leaf if device is None else leaf.to(device, copy=True) for leaf, device in pairs]
        return pytree.tree_unflatten(leaves, self.structure)


class KeptTexts:
    """Results of a pipeline's `encode_prompt`, kept in the host's memory: those that were used last.

    A text is read alike by all requests with the same adapters, whose seeds, sizes and steps differ; where
    text encoders are offloaded, reading it takes as long as moving them. One thread uses it.

    Args:
        most_bytes: of all that is kept.

    Attributes:
        adapters: those in use, which may be in text encoders too.
        nbytes: of all that is kept, with the texts themselves.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.adapters: Hashable = ()
        self.nbytes = 0
        self._most_bytes = most_bytes
        self._kept: OrderedDict[Hashable, _Read] = OrderedDict()

    def of(self, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of the model's `encode` with these arguments. What it makes of pictures is not kept."""
        given = [*enumerate(args), *sorted(kwargs.items())]
        if not all(isinstance(value, _PLAIN) for _, value in given):
            return encode(*args, **kwargs)
        key = self.adapters, *((name, type(value), value) for name, value in given)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key].there()
        result = encode(*args, **kwargs)
        self._keep(key, result, sum(sys.getsizeof(value) for _, value in given))
        return result

    def _keep(self, key: Hashable, result: Any, key_bytes: int) -> None:
        leaves, structure = pytree.tree_flatten(result)
        devices = [leaf.device if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
        if any(device is not None and device.type == "meta" for device in devices):
            return  # there is nothing to keep
        on_host = [leaf.to("cpu", copy=True) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        nbytes = key_bytes + sum(leaf.nbytes for leaf in on_host if isinstance(leaf, torch.Tensor))
        read = _Read(on_host, devices, structure, nbytes)
        if read.nbytes > self._most_bytes:
            return
        self._kept[key] = read
        self.nbytes += read.nbytes
        while self.nbytes > self._most_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.nbytes -= oldest.nbytes
