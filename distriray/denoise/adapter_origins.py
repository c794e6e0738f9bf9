"""A LoRA file by diffusers' names, with nothing of it left out.

diffusers takes the files of many trainers, and what it does not know of one it drops, with a line in a log
or with none: text encoders of FLUX.1, biases, norms.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

_FACTOR = re.compile(r"\.(alpha|lora[._].*)$")
"""What follows the name of a layer."""
_TWICE = re.compile(r"attention[._](qkv|out)[._]")
"""Layers of Z-Image that some files have whole, and once more in parts, which diffusers takes."""


class _Origins(TorchFunctionMode):
    """Knows, while it is entered, which tensors of a file others are made of."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._tensors = tensors
        self._of = WeakTensorKeyDictionary({tensor: frozenset({name}) for name, tensor in tensors.items()})
        self._read: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        origins = self.of(tree_leaves((args, kwargs)))
        if func is Tensor.item:  # of an alpha itself: what is asked of others is whether they are zero
            self._read |= {name for name in origins if self._tensors[name] is args[0]}
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._of[made] = origins | self._of.get(made, frozenset())
        return result

    def of(self, values: Sequence[Any]) -> frozenset[str]:
        """The names of what the tensors among these are made of."""
        tensors = [each for each in values if isinstance(each, Tensor)]
        return frozenset().union(*(self._of.get(each, frozenset()) for each in tensors))

    def left_out(self, values: Sequence[Any]) -> list[str]:
        """Names of what is not in any of these values."""
        used = self.of(values) | self._read
        return [name for name in self._tensors if name not in used]


def converted(pipeline: Any, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights by the names that diffusers gives them, and alphas that are not in them.

    Raises:
        ValueError: diffusers does not know the file, or would leave something out that counts.
    """
    unet = getattr(pipeline, "unet", None)
    options = {} if unet is None else {"unet_config": unet.config}
    with _Origins(tensors) as origins:
        result = pipeline.lora_state_dict(dict(tensors), return_alphas=True, **options)
    weights, alphas = result if isinstance(result, tuple) else (result, None)
    alphas = alphas or {}
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layers.setdefault(_FACTOR.sub("", name), {})[name] = tensor
    for name in origins.left_out([*weights.values(), *alphas.values()]):
        if not _TWICE.search(name) and _counts(name, layers[_FACTOR.sub("", name)]):
            raise ValueError(f"{name} is nothing that diffusers loads for a {type(pipeline).__name__}")
    return weights, {name: float(alpha) for name, alpha in alphas.items()}


def _counts(name: str, layer: Mapping[str, Tensor]) -> bool:
    """Whether a picture is another one without that weight, or alpha, of a layer."""
    factors = {each: tensor for each, tensor in layer.items() if not each.endswith(".alpha")}
    if any(not bool(factor.any()) for factor in factors.values()):
        return False
    if not name.endswith(".alpha"):
        return True
    ranks = [len(factor) for each, factor in factors.items() if "down" in each or "lora_A" in each]
    return any(float(layer[name]) != rank for rank in ranks)
