"""Keys and values are computed where they are to be, if nothing but a weight makes them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn.utils import parametrize

from distriray.parallel.exchange.own import Computed, Projected
from distriray.parallel.layers.bare import is_bare, without_idle_adapters
from tests.unit.parallel.stand_in import OnDevice, StandIn

TOKENS, INPUT, CHANNELS = 6, 8, 16


def place_in(memory: torch.Tensor, batch: int) -> torch.Tensor:
    """Of the second of three layers and of the last tokens, as a bucket has it."""
    return memory[-TOKENS:].unflatten(1, (3, 2, batch, CHANNELS))[:, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("on_device", [False, True])
@torch.no_grad()
def test_products_are_put_where_they_are_to_be_and_nowhere_else(
    on_device: bool, batch: int, dtype: torch.dtype
) -> None:
    input = torch.randn(batch, INPUT, TOKENS, dtype=dtype).transpose(1, 2)  # as a feature map is made tokens
    weights = [torch.randn(CHANNELS, INPUT, dtype=dtype) for _ in range(2)]
    wanted, found = (torch.zeros(2 * TOKENS, 6 * batch * CHANNELS, dtype=dtype) for _ in range(2))
    Computed(*(F.linear(input, weight) for weight in weights)).put(place_in(wanted, batch))
    with StandIn() if on_device else nullcontext():
        own = Projected(*(OnDevice(tensor) if on_device else tensor for tensor in (input, *weights)))
        own.put(place_in(OnDevice(found) if on_device else found, batch))
    assert own.shape == (batch, TOKENS, CHANNELS) and own.like.dtype == dtype
    computed = Projected(input, *weights).computed()
    Computed(*computed).put(place_in(wanted, batch))
    assert found.any() and torch.equal(found != 0, wanted != 0)
    torch.testing.assert_close(found, wanted)


class Doubling(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class Shifted(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + 1


def bare() -> nn.Linear:
    return nn.Linear(INPUT, CHANNELS, bias=False)


def changed(change: Callable[[nn.Linear], object]) -> nn.Linear:
    linear = bare()
    change(linear)
    return linear


class Rounded(torch.Tensor):
    """Whatever is a weight, and no ordinary tensor."""


CHANGES: dict[str, Callable[[], nn.Linear]] = {
    "a bias": lambda: nn.Linear(INPUT, CHANNELS),
    "a class of its own": lambda: Doubling(INPUT, CHANNELS, bias=False),
    "a parametrization": lambda: changed(
        lambda linear: parametrize.register_parametrization(linear, "weight", Shifted())
    ),
    "a weight of another class": lambda: changed(
        lambda linear: linear._parameters.update(weight=linear.weight.detach().as_subclass(Rounded))
    ),
    "another dtype": lambda: bare().to(torch.float64),
    "a hook": lambda: changed(lambda linear: linear.register_forward_hook(lambda *_: None)),
    "a hook before it": lambda: changed(lambda linear: linear.register_forward_pre_hook(lambda *_: None)),
    "a forward of its own": lambda: changed(lambda linear: setattr(linear, "forward", lambda input: input)),
    "a compiled forward": lambda: changed(
        lambda linear: setattr(linear, "forward", torch.compile(linear.forward))
    ),
}


@pytest.mark.parametrize("make", CHANGES.values(), ids=CHANGES)
def test_layers_that_do_more_than_multiply_are_called(make: Callable[[], nn.Linear]) -> None:
    assert not is_bare(make(), torch.ones(1, TOKENS, INPUT))


def test_layers_that_only_multiply_are_not_but_under_autocast() -> None:
    input = torch.ones(1, TOKENS, INPUT)
    assert is_bare(bare(), input)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_bare(bare(), input)


def around(linear: nn.Linear) -> LoraLinear:
    """Two LoRAs around a layer, of which the first is in use."""
    adapted = LoraLinear(
        linear, "first", LoraConfig(r=2, init_lora_weights=False), r=2, init_lora_weights=False
    )
    adapted.update_layer("second", r=2, lora_alpha=1, config=LoraConfig(r=2))
    adapted.set_adapter("first")
    return adapted


def test_adapters_that_are_not_in_use_are_passed_by() -> None:
    linear = bare()
    adapted = around(linear)
    input = torch.randn(2, TOKENS, INPUT)
    assert without_idle_adapters(linear) is linear
    assert without_idle_adapters(adapted) is adapted and not torch.equal(adapted(input), linear(input))
    for idle in (lambda: adapted.set_adapter([]), lambda: adapted.enable_adapters(False)):
        idle()
        assert without_idle_adapters(adapted) is linear and torch.equal(adapted(input), linear(input))
    adapted.enable_adapters(True)
    adapted.set_adapter("second")
    assert without_idle_adapters(adapted) is adapted


@pytest.mark.parametrize(
    "change",
    [
        lambda adapted: adapted.merge(adapter_names=["first"]),
        lambda adapted: adapted.register_forward_hook(lambda *_: None),
        lambda adapted: setattr(adapted, "forward", lambda input: 2 * adapted.base_layer(input)),
    ],
)
def test_adapters_with_something_around_them_are_not_passed_by(change: Callable[[LoraLinear], Any]) -> None:
    adapted = around(bare())
    change(adapted)
    adapted.set_adapter([])
    assert without_idle_adapters(adapted) is adapted
