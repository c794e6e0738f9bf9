"""Keys and values are computed where they are to be, if nothing but a weight makes them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from distriray.parallel.exchange.own import Computed, Projected
from distriray.parallel.layers.bare import is_bare
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
