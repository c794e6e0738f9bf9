"""Buffers in flight are neither read nor written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, run_in_lockstep
from distriray.config import MIXES, ExchangeMode, Mix, Weights
from distriray.errors import GangBroken
from distriray.parallel import engine_of
from distriray.parallel.exchange import exchange as exchanges
from distriray.parallel.exchange.exchange import Exchange
from distriray.parallel.exchange.slots import LAYERS_CHANGED
from distriray.parallel.exchange.step import Step
from distriray.parallel.partition import Partition, Window
from tests.models import tiny_flux, tiny_sdxl, tiny_sdxl_unet
from tests.parameters import pairwise, sweep


class Eager:
    """A gang of two whose other rank does what this one does, with messages that land at the worst time.

    Until it is waited for, what is being received is garbage; what was sent must still be what it was.
    """

    rank, world_size, peers, device, broken, bytes_sent = 0, 2, (1,), torch.device("cpu"), False, 0

    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> Any:
        return _Flight(sends, receives)

    def subgroup(self, ranks: Sequence[int]) -> Eager:
        assert list(ranks) == [0, 1]
        return self

    def check(self) -> None: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...


class _Flight:
    def __init__(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> None:
        self.sends = {peer: (tensor, tensor.clone()) for peer, tensor in sends.items()}
        self.receives = receives
        for tensor in receives.values():
            tensor.view(-1).view(torch.uint8).fill_(0xFF)  # not a number in every float format

    def wait(self) -> None:
        for peer, tensor in self.receives.items():
            sent, then = self.sends[peer]
            assert sent.view(-1).view(torch.uint8).equal(then.view(-1).view(torch.uint8))
            arrived, bytes_sent = tensor.view(-1).view(torch.uint8), then.view(-1).view(torch.uint8)
            count = min(len(arrived), len(bytes_sent))  # halos differ in size between the two ranks
            arrived.zero_()[:count].copy_(bytes_sent[:count])


FEW_BITS = Mix(halos_width="int8", keys_values_width="int4")
LATE_AND_FEW_BITS = Mix(statistics="stale", halos="stale", keys_values="stale", keys_values_width="int4")


MODES = ["displaced", "displaced_attention", FEW_BITS, LATE_AND_FEW_BITS]


@pytest.mark.parametrize(
    ("exchange", "statistics", "keys_values"), sweep(pairwise(MODES, [0.0, 0.5], [0.0, 0.5]), first=2)
)
def test_nothing_in_flight_is_read_or_overwritten(
    exchange: Any, statistics: float, keys_values: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "encoder_hidden_states": torch.randn((1, 7, 32), generator=generator),
        "added_cond_kwargs": {"text_embeds": torch.ones((1, 16)), "time_ids": torch.ones((1, 6))},
    }
    sample = torch.randn((1, 4, 16, 8), generator=generator)
    for buckets in (1, 4, 7, 1000):  # so that slots of every kind come last in one
        prediction = {"statistics": statistics, "keys_values": keys_values}
        config = ParallelConfig(exchange=exchange, warmup_steps=1, prediction=prediction)
        unet = parallelize(tiny_sdxl_unet(), Eager(), config)
        engine = engine_of(unet)
        assert engine is not None
        engine.exchanges.bucket_count = buckets
        with engine.image():
            for step in range(3):
                noise = unet(sample, 900 - step, **inputs).sample
                assert noise.isfinite().all(), (buckets, step)
        assert not engine.statistics.synchronous


@pytest.mark.parametrize(
    ("make", "exchange", "parts"),
    [
        (tiny_sdxl, "displaced_attention", True),
        (tiny_sdxl, "displaced", False),
        (tiny_flux, "displaced_attention", False),
    ],
)
def test_large_old_values_leave_in_more_parts_where_fresh_ones_wait_for_the_link(
    make: Callable[[], Any], exchange: ExchangeMode, parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the picture is the same, bit for bit."""
    case = {"height": 128, "width": 64, "num_inference_steps": 3, "output_type": "latent"}
    config = ParallelConfig(exchange=exchange, warmup_steps=1, cfg_parallel=False)

    def rank(communicator: Communicator) -> tuple[torch.Tensor, int]:
        pipeline = parallelize(make(), communicator, config)
        engine = engine_of(pipeline)
        assert engine is not None
        latents = pipeline("a lake", generator=torch.Generator().manual_seed(7), **case).images
        return latents, engine.statistics.waits

    few = run_in_lockstep(2, rank)
    monkeypatch.setattr(exchanges, "BUCKET_BYTES", 256)
    many = run_in_lockstep(2, rank)
    for (latents, _), (expected, _) in zip(many, few, strict=True):
        assert latents.equal(expected)
    (of_few,), (of_many,) = ({waits for _, waits in everyone} for everyone in (few, many))
    assert (of_many > of_few) == parts and of_many >= of_few


def ask(step: Step, channels: Sequence[int]) -> None:
    """Layers of so many channels that ask for halo rows."""
    for count in channels:
        step.padded(torch.ones(1, count, 8, 4), Window(3, 1, 1, (1, 1)))


class Counting(Eager):
    """Also counts how often each transfer was waited for."""

    def __init__(self) -> None:
        self.waits: list[int] = []
        self.broken = False

    def exchange(self, sends: Any, receives: Any) -> Any:
        flight, number, wait = super().exchange(sends, receives), len(self.waits), _Flight.wait
        self.waits.append(0)

        def counted() -> None:
            if self.broken:
                raise GangBroken("a peer died")
            self.waits[number] += 1
            wait(flight)

        flight.wait = counted
        return flight


def under_way() -> tuple[Counting, Exchange]:
    """An exchange with transfers that nobody has waited for yet, behind a displaced step."""
    gang: Any = Counting()
    exchange = Exchange(gang, Partition(16, 4, 0, 2), MIXES["displaced"], Weights())
    for displaced in (False, True, True):
        with exchange.step(displaced=displaced) as step:
            ask(step, (2, 3))
    assert 0 in gang.waits and 1 in gang.waits
    return gang, exchange


@pytest.mark.parametrize("then", ["restart", "abandon", "a synchronous step"])
def test_transfers_are_waited_for_once_before_what_they_write_is_used_again(then: str) -> None:
    gang, exchange = under_way()
    if then == "a synchronous step":
        with exchange.step() as step:
            assert set(gang.waits) == {1}
            ask(step, (2, 3))
    else:
        getattr(exchange, then)()
        assert set(gang.waits) == {1}
        exchange.drain()
        assert set(gang.waits) == {1}


def test_buffers_of_a_gang_that_is_broken_can_be_let_go() -> None:
    gang, exchange = under_way()
    gang.broken = True
    with pytest.raises(GangBroken):
        exchange.restart()
    exchange.abandon()


@pytest.mark.parametrize("displaced", [True, False])
@pytest.mark.parametrize("changed", [(2,), (2, 3, 4), (2, 4)])
def test_layers_that_change_in_the_middle_of_an_image_are_an_error_and_between_images_none(
    changed: tuple[int, ...], displaced: bool
) -> None:
    gang: Any = Eager()
    exchange = Exchange(gang, Partition(16, 4, 0, 2), MIXES["displaced"], Weights())
    for layers, follows in (((2, 3), False), (changed, True)):
        exchange.restart()
        with exchange.step() as step:
            ask(step, layers)
        with exchange.step(displaced=True) as step:
            ask(step, layers)
        if not follows:
            with pytest.raises(RuntimeError, match=LAYERS_CHANGED), exchange.step(displaced) as step:
                ask(step, changed)
