"""The table of network families, and a made-up family that is added to it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from distriray import ParallelConfig, parallelize
from distriray.collective import Communicator, connect, run_in_lockstep
from distriray.errors import GangMismatch, InvalidRequest, UnsupportedModel
from distriray.parallel import engine_of, network_of
from distriray.parallel.networks.base import Call
from distriray.parallel.networks.registry import NETWORKS, NetworkFamily
from tests.models import ready, tiny_sd15_unet, tiny_sdxl_unet
from tests.unit.parallel.pond import CHANNELS, Pond, PondNetwork

CLOCK = [0.0, 0.2, 0.4, 0.6]
SYNC = ParallelConfig(exchange="sync", cfg_parallel=False)
DISPLACED = ParallelConfig(exchange="displaced", warmup_steps=1, cfg_parallel=False)
SIDES = ("wet", "dry")


@pytest.fixture(autouse=True)
def ponds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "Pond", NetworkFamily("tests.unit.parallel.pond:PondNetwork", "ponds"))


def pond(seed: int = 0) -> Pond:
    return ready(Pond(), seed)


def draw(network: nn.Module, sides: tuple[str, ...] = SIDES, batch: int = 1) -> dict[str, list[torch.Tensor]]:
    """What the network says of one image, by side: at each time (batch, 4, 7, 5)."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn((batch, 4, 7, 5), generator=generator)
    captions = {side: torch.randn((batch, 3, CHANNELS), generator=generator) for side in SIDES}
    said: dict[str, list[torch.Tensor]] = {side: [] for side in sides}
    engine = engine_of(network)
    with nullcontext() if engine is None else engine.image():
        for clock in CLOCK:
            for side in sides:
                answer = network((1 + clock) * latents, clock, caption=captions[side], side=side)
                said[side].append(answer["velocity"])
    return said


def gang(ranks: int, function: Callable[[Communicator], Any]) -> list[Any]:
    return run_in_lockstep(ranks, function)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_new_family_equals_one_device(ranks: int) -> None:
    expected = draw(pond())
    for said in gang(ranks, lambda communicator: draw(parallelize(pond(), communicator, SYNC))):
        for side in SIDES:
            torch.testing.assert_close(said[side], expected[side])


def test_the_halves_of_a_gang_compute_halves_of_the_batch_of_a_new_family() -> None:
    expected = draw(pond(), batch=2)
    config = ParallelConfig(cfg_parallel=True)
    for said in gang(2, lambda communicator: draw(parallelize(pond(), communicator, config), batch=2)):
        for side in SIDES:
            torch.testing.assert_close(said[side], expected[side])


def test_the_network_of_a_pipeline_is_found_whatever_its_attribute() -> None:
    class Pipeline:
        transformer = pond()
        scheduler = SimpleNamespace(timesteps=torch.tensor([0.0]))

    pipeline = parallelize(Pipeline(), connect("local"))
    engine = engine_of(pipeline)
    assert engine is not None and type(engine.network) is PondNetwork
    assert engine is engine_of(pipeline.transformer)


def displaced(
    communicator: Communicator, sides: tuple[str, ...], config: ParallelConfig = DISPLACED
) -> tuple[list[bool], dict[str, Any]]:
    """Of two images, which calls were synchronous, and what was said of the second."""
    network = parallelize(pond(), communicator, config)
    engine = engine_of(network)
    assert engine is not None
    synchronous: list[bool] = []
    network.register_forward_hook(lambda *_: synchronous.append(engine.statistics.synchronous))
    draw(network, sides)
    return synchronous, draw(network, sides)


@pytest.mark.parametrize("max_buffer_bytes", [0, 2**30])
def test_every_branch_has_steps_of_its_own_and_time_may_rise(max_buffer_bytes: int) -> None:
    config = DISPLACED.model_copy(update={"max_buffer_bytes": max_buffer_bytes})
    image = [True, True] + [False, False] * (len(CLOCK) - 1)
    for synchronous, _ in gang(2, lambda communicator: displaced(communicator, SIDES, config)):
        assert synchronous == image * 2


def test_a_branch_reads_no_stale_values_of_another() -> None:
    both = gang(2, lambda communicator: displaced(communicator, SIDES))[0][1]
    for side in SIDES:
        (_, alone), (_, peers) = gang(2, lambda communicator, side=side: displaced(communicator, (side,)))
        exact = draw(pond(), (side,))[side]
        for ours, mine, theirs in zip(both[side], alone[side], peers[side], strict=True):
            assert torch.equal(ours, mine) and torch.equal(mine, theirs)
        assert not torch.allclose(alone[side][-1], exact[-1], atol=1e-3)  # it was displaced indeed


def test_a_family_names_what_it_refuses() -> None:
    with pytest.raises(UnsupportedModel, match="the pond is frozen"):
        parallelize(Pond(frozen=True), connect("local"))
    network = parallelize(pond(), connect("local"))
    network.weir = nn.AvgPool2d(1)
    with pytest.raises(UnsupportedModel, match="layer weir, AvgPool2d"):
        draw(network)


def test_ranks_with_another_caption_are_told_so_in_the_words_of_the_family() -> None:
    def rank(communicator: Communicator) -> None:
        network = parallelize(pond(), communicator, SYNC)
        network(torch.ones((1, 4, 7, 5)), 0.0, caption=torch.full((1, 3, CHANNELS), 1.0 + communicator.rank))

    with pytest.raises(GangMismatch, match="sum of the caption 24 and 48"):
        gang(2, rank)


def test_an_output_that_is_not_gathered_once_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PondNetwork, "compute", lambda self, call, share, collect: None)
    network = parallelize(pond(), connect("local"))
    with pytest.raises(RuntimeError, match="PondNetwork collected its output 0 times"):
        network(torch.ones((1, 4, 7, 5)), 0.0, caption=torch.ones((1, 3, CHANNELS)))


def test_a_network_of_no_family_is_refused_with_all_that_there_are() -> None:
    class Puddle(nn.Module):
        pass

    known = r"Puddle denoises with Puddle; .*UNet2DConditionModel: .*1\.x, 2\.x and XL; .*; a Pond: ponds"
    with pytest.raises(UnsupportedModel, match=known):
        parallelize(Puddle(), connect("local"))


def test_a_name_alone_does_not_make_a_network_one_of_a_family() -> None:
    stranger = type("UNet2DConditionModel", (nn.Module,), {})
    with pytest.raises(UnsupportedModel, match="denoises with UNet2DConditionModel"):
        parallelize(stranger(), connect("local"))


def test_every_entry_of_the_table_is_the_family_of_its_class() -> None:
    for name, family in NETWORKS.items():
        assert family.network.kind.__name__ == name


@pytest.mark.parametrize("make", [tiny_sdxl_unet, tiny_sd15_unet, pond])
def test_as_many_ranks_as_units_of_rows_and_no_more(make: Callable[[], nn.Module]) -> None:
    network = network_of(make())
    call = Call(torch.empty((1, 4, 3 * network.row_unit, 8)), 0.0, torch.empty((1, 3, CHANNELS)))
    assert network.partition(call, 3).counts(0) == (network.row_unit,) * 3
    with pytest.raises(InvalidRequest, match="too small for 4 patches"):
        network.partition(call, 4)


@pytest.mark.parametrize("make", [tiny_sdxl_unet, pond])
def test_the_forward_of_a_parallelized_network_has_the_networks_own_parameters(
    make: Callable[[], nn.Module],
) -> None:
    network = make()
    before = inspect.signature(network.forward)
    assert inspect.signature(parallelize(network, connect("local")).forward) == before
